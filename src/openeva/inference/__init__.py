"""A trained model at work on anybody's images and videos: classes, features, and where it looks.

images -> `inputs` (paths, URLs, arrays) -> `predictor` (threads, batches, the weights' own view) -> classes with names,
`embeddings`, `maps` (attention, relevance) -> `picture`; a CLIP's classes are any `texts`
videos -> `videos` (windows, clips, the same predictor) -> actions with times -> `strip`, a picture of frames
folder -> `search` (an index on disk, by both `towers` of a CLIP) -> images that fit texts or images -> `contact_sheet`
"""

from openeva.inference.embeddings import Embeddings, features, writing
from openeva.inference.inputs import ImageError, find_images, find_videos
from openeva.inference.predictor import Guess, Prediction, Predictor, Wanted, predict
from openeva.inference.search import Hit, Index
from openeva.inference.videos import Segment, VideoPrediction, Windows

__all__ = [
    "Embeddings", "Guess", "Hit", "ImageError", "Index", "Prediction", "Predictor", "Segment", "VideoPrediction",
    "Wanted", "Windows", "features", "find_images", "find_videos", "predict", "writing",
]  # fmt: skip
