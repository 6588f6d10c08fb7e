"""Export trained models to ONNX, torch.export, timm folders and packed weights."""
