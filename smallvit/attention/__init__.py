"""Where models look: attention maps, rollout, relevance, and their pictures.

logits, maps = smallvit.attention.record(model, images)
shares = smallvit.attention.rollout(maps)
"""

from smallvit.attention.flow import relevance, rollout
from smallvit.attention.maps import AttentionMap, record

__all__ = ["AttentionMap", "record", "relevance", "rollout"]
