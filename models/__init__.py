"""Models: encoder, backbone, poolings, heads. `models.Backbone` is what configs name."""

from longwave.models.backbone import Backbone
from longwave.models.encoders import LinearEncoder, PatchEncoder, TokenEmbedding
from longwave.models.heads import Classifier, cls, last, mean
from longwave.models.inputs import Features, Tokens

__all__ = [
    "Backbone",
    "Classifier",
    "Features",
    "LinearEncoder",
    "PatchEncoder",
    "TokenEmbedding",
    "Tokens",
    "cls",
    "last",
    "mean",
]
