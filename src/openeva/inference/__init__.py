"""A trained model at work on anybody's images: classes, features, and where it looks.

images -> `inputs` (paths, URLs, arrays) -> `predictor` (threads, batches, the weights' own view) -> classes with names,
`embeddings`, `maps` (attention, relevance) -> `picture`
"""

from openeva.inference.embeddings import Embeddings, features, writing
from openeva.inference.inputs import ImageError, find_images
from openeva.inference.predictor import Guess, Prediction, Predictor, Wanted, predict

__all__ = [
    "Embeddings", "Guess", "ImageError", "Prediction", "Predictor", "Wanted", "features", "find_images", "predict",
    "writing",
]  # fmt: skip
