"""What happens to a clip, a sample, a batch, a restored video.

Sub-packages, each importing only those after it: evaluation; training and restoration (never each other);
data; metrics; weights; video; runtime; store. Below all of them: model and degradations."""
