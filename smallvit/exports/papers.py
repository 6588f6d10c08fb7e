"""The papers that a model rests on, to be cited."""

from __future__ import annotations

from typing import Any

from smallvit.binaryvit import BINARYVITS
from smallvit.convnets import CIFAR_RESNETS
from smallvit.datasets.table import DATASETS
from smallvit.models import OURS

PAPERS = {
    "SPT, LSA and the models for small images": (
        "lee2021vision",
        "Vision Transformer for Small-Size Datasets",
        "Lee, Seung Hoon and Lee, Seunghyun and Song, Byung Cheol",
        "2112.13492",
        2021,
    ),
    "Distillation token, DeiT": (
        "touvron2020training",
        "Training data-efficient image transformers & distillation through attention",
        "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre and "
        "J{\\'e}gou, Herv{\\'e}",
        "2012.12877",
        2020,
    ),
    "ResNets for CIFAR": (
        "he2015deep",
        "Deep Residual Learning for Image Recognition",
        "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
        "1512.03385",
        2015,
    ),
    "BinaryViT": (
        "le2023binaryvit",
        "BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models",
        "Le, Phuoc-Hoan Charles and Li, Xinlin",
        "2306.16678",
        2023,
    ),
}
"""What a model may rest on: key, title, authors, arXiv id, year."""


def citation(spec: dict[str, Any], data: str) -> str:
    """BibTeX for a model that `create_model` made of these arguments, and who is to be cited for its data; Markdown."""
    small = bool(spec.get("spt") or spec.get("lsa")) or spec["arch"] in {*OURS} - {*BINARYVITS}
    binary = bool(spec.get("binary")) or spec["arch"] in BINARYVITS
    deit = spec["arch"].startswith("deit") or bool(spec.get("dist_token"))
    named = zip(PAPERS.values(), (small, deit, spec["arch"] in CIFAR_RESNETS, binary), strict=True)
    entries = [
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
        for (key, title, authors, number, year), cited in named
        if cited
    ]
    told = f"\n\nData: {DATASETS[data].citation}." if data in DATASETS else ""
    return ("```bibtex\n" + "\n".join(entries) + "\n```" if entries else "The architecture is timm's.") + told
