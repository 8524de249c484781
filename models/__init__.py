"""Models: encoder, backbone, poolings, heads. `models.Backbone` is what configs name."""

from longwave.models.backbone import Backbone
from longwave.models.encoders import (
    LearnedPositions,
    LinearEncoder,
    OneHotEncoder,
    PatchEncoder,
    SinusoidalPositions,
    TokenEmbedding,
)
from longwave.models.heads import (
    Classifier,
    PairClassifier,
    TokenClassifier,
    cls,
    compared,
    first,
    largest,
    last,
    mean,
    side_by_side,
)
from longwave.models.inputs import Features, Tokens
from longwave.models.language_model import LanguageModel

__all__ = [
    "Backbone",
    "Classifier",
    "Features",
    "LanguageModel",
    "LearnedPositions",
    "LinearEncoder",
    "OneHotEncoder",
    "PairClassifier",
    "PatchEncoder",
    "SinusoidalPositions",
    "TokenClassifier",
    "TokenEmbedding",
    "Tokens",
    "cls",
    "compared",
    "first",
    "largest",
    "last",
    "mean",
    "side_by_side",
]
