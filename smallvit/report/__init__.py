"""Write runs as an HTML page, and as a model card for the Hugging Face Hub."""
