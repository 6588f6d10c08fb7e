"""Extract and visualize attention maps, rollout and relevance of trained models.

logits, maps = smallvit.attention.extract_attention(model, images)
rollout = smallvit.attention.rollout(maps)
"""

from smallvit.attention.maps import AttentionMap, extract_attention
from smallvit.attention.rollout import relevance, rollout

__all__ = ["AttentionMap", "extract_attention", "relevance", "rollout"]
