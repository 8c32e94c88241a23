"""CVG's classifier: which composition a video is about to have, read off the attention maps of its words."""

from cvg_kernels.composition.classifier import CompositionClassifier
from cvg_kernels.composition.entities import Entity, entities_of
from cvg_kernels.composition.features import FeatureReader, Selection, with_context

__all__ = ["CompositionClassifier", "Entity", "FeatureReader", "Selection", "entities_of", "with_context"]
