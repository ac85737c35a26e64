"""Restoration of one video of any length and size, frames in and frames out, in constant memory.

A clip passes as one stream through the autoencoder's encoder (each convolution remembers its last inputs),
the transformer restores overlapping chunks of that latent sequence, and the blended latents pass through the
decoder as one stream again. Sides are padded to multiples of 16 by repeating the edge, and the frame count to
4n+1 by repeating the last frame; both are trimmed at the end, so nothing is cropped.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model import colour_fix, preprocess
from model.denoise import denoise
from model.vae.autoencoder import CausalVideoAutoencoder
from model.vae.causal_conv import StreamMemory, channels_last
from pipeline.restoration import memory_plan
from pipeline.restoration.chunking import (
    Chunk,
    ChunkBlender,
    ChunkCutter,
)
from pipeline.restoration.memory_plan import MemoryPlan, Models
from pipeline.restoration.sampling_config import Sampling
from pipeline.restoration.vae_reconstruction import UNKNOWN_LENGTH
from pipeline.store.schema import TEMPORAL_FACTOR
from pipeline.weights import weights_folder
from pipeline.weights.backbones import Backbone, ModelConfig, load_with_prompts
from pipeline.weights.frame_noise import frame_noise

STEPS_OF_WORK = ("read", "encode", "transformer", "decode", "pixels", "write")
"""Parts of the work that are timed; pixels is resizing and colours, read and write concern files."""

T = TypeVar("T")


class Restorer:
    """Restores videos and images with one pair of models.

    restorer = Restorer.from_weights(ModelConfig("file:///weights/dit", vae="file:///weights/vae"))
    for frames in restorer.restore(iter_of_uint8_frames, size=(720, 1280)):
        ...                                     # uint8 (t, 720, 1280, 3), in order, as many as went in
    """

    def __init__(
        self,
        vae: CausalVideoAutoencoder,
        backbone: Backbone,
        sampling: Sampling | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.sampling = sampling or Sampling()
        self.device, self.dtype = placement(device)
        self.schedule = self.sampling.schedule(backbone.schedule)
        if self.schedule.guidance_scale != 1 and backbone.negative is None:
            raise ValueError("sampling.guidance_scale: guidance needs a positive and a negative prompt")
        self.vae = vae.to(self.device, self.dtype).eval()
        self.dit = backbone.network.to(self.device, self.dtype).eval()
        self.shape_quirk = backbone.shape_quirk
        self.prompt = backbone.prompt.to(self.device, self.dtype)
        self.negative = backbone.negative and backbone.negative.to(self.device, self.dtype)
        self.plan: MemoryPlan | None = None
        """Plan for restoring within a given memory; None restores as `sampling` says, on whole frames."""
        self.seconds = dict.fromkeys(STEPS_OF_WORK, 0.0)
        """Time spent so far in each part."""
        self.part = ""
        """The part that began last."""

    @classmethod
    def from_weights(
        cls,
        model: ModelConfig,
        sampling: Sampling | None = None,
        device: torch.device | str | None = None,
    ) -> "Restorer":
        """Load the models from folders that training wrote, or from released files."""
        place, dtype = placement(device)
        return cls(
            weights_folder.load_vae(model.vae), load_with_prompts(model, dtype, place), sampling, place
        )

    def plans(self, size: tuple[int, int]) -> list[MemoryPlan]:
        """All plans for results of (height, width) pixels, the one to be preferred first."""
        wanted = self.sampling
        models = Models.of(self.vae, self.dit, self.device)
        return list(
            memory_plan.plans(models, size, wanted.chunk_frames, wanted.overlap_frames, wanted.slice_frames)
        )

    def use(self, network: nn.Module) -> None:
        """Put a network on the device; when offloading, the other one moves to the CPU's memory."""
        if self.plan is not None and self.plan.offload:
            other = self.dit if network is self.vae else self.vae
            other.to("cpu")
        network.to(self.device)

    def restore(
        self, frames: Iterable[np.ndarray], size: tuple[int, int] | None = None, deep: bool = False
    ) -> Iterator[np.ndarray]:
        """Restored frames (t, H, W, 3) of uint8 or uint16 (H, W, 3) frames; as many come out as go in.

        size: (height, width) of the result; as the input if None. deep: uint16 results instead of uint8.
        Frames are taken as they are needed.
        """
        stream: RestoreStream | None = None
        for frame in frames:
            stream = stream or RestoreStream(self, size or (frame.shape[0], frame.shape[1]), deep)
            yield from stream.push(frame)
        if stream is not None:
            yield from stream.finish()

    @torch.inference_mode()
    def denoise(self, chunk: Chunk) -> Chunk:
        """The restored latent of a chunk of low-quality latent, fp32 (t, H', W', 16)."""
        noise, condition_noise = (
            frame_noise(self.sampling.seed, purpose, chunk.start, tuple(chunk.latent.shape)).to(self.device)
            for purpose in ("initial", "condition")
        )
        latent = denoise(
            self.dit,
            chunk.latent,
            noise,
            condition_noise,
            self.schedule,
            self.prompt,
            self.negative,
            self.shape_quirk,
        )
        return Chunk(chunk.start, latent)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of its body to `seconds[part]`; `part` tells where a failure occurred."""
        self.part = part
        start = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] += time.monotonic() - start

    def timed_items(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, adding the time that each takes to arrive to `seconds[part]`."""
        iterator = iter(items)
        while True:
            with self.timed(part):
                item = next(iterator, None)
            if item is None:
                return
            yield item


def placement(device: torch.device | str | None) -> tuple[torch.device, torch.dtype]:
    """Where the networks run (null: on a GPU if there is one) and in which precision."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # bf16 products are some hundred times slower than fp32 on CPUs that have no instruction for them.
    return place, torch.bfloat16 if place.type == "cuda" else torch.float32


class RestoreStream:
    """One video on its way through: frames are pushed in, restored frames come out some chunks later.

    What it holds is bounded: at most a slice of frames not yet encoded, a chunk of latents, the tails of the
    convolutions, and the input frames (for the colours) whose restored ones are not out yet.

    Between two results, once `push` has given all that it had, `state_dict` holds all but input frames: a
    stream that loads it and is fed from frame `frames_out` on gives the same frames, bit for bit.
    """

    def __init__(self, restorer: Restorer, size: tuple[int, int], deep: bool = False) -> None:
        self._restorer = restorer
        self._size = size
        self._deep = deep
        self._frame_shape: tuple[int, ...] | None = None
        self._encoding, self._decoding = StreamMemory(), StreamMemory()
        self._sampling = restorer.sampling
        self._band_pixels: int | None = None
        self._tails_on_host = False
        if restorer.plan is not None:
            limits = ("chunk_frames", "overlap_frames", "slice_frames")
            within = {name: getattr(restorer.plan, name) for name in limits}
            self._sampling = replace(self._sampling, **within)
            self._band_pixels = restorer.plan.band_pixels
            self._tails_on_host = restorer.plan.tails_on_host
        self._cutter = ChunkCutter(self._sampling.chunks)
        self._blender = ChunkBlender(self._sampling.chunks)
        self._to_encode: list[np.ndarray] = []
        self._inputs: deque[np.ndarray] = deque()
        self.frames_out = 0
        """Number of frames returned so far."""

    def state_dict(self) -> dict[str, Tensor]:
        """Flat CPU tensors, ready for safetensors."""
        assert not self._to_encode and self._frame_shape is not None
        parts = {
            "encoding": self._encoding.state_dict(),
            "decoding": self._decoding.state_dict(),
            "cutter": self._cutter.state_dict(),
            "blender": self._blender.state_dict(),
            "stream": {
                "frames_out": torch.tensor(self.frames_out),
                "frame_shape": torch.tensor(self._frame_shape),
            },
        }
        return {
            f"{part}.{name}": tensor.contiguous().cpu()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, in a stream of the same models, sampling and size."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            part, name = key.split(".", 1)
            on_host = self._tails_on_host and part in ("encoding", "decoding")
            parts.setdefault(part, {})[name] = tensor if on_host else tensor.to(self._restorer.device)
        self._encoding, self._decoding = (
            StreamMemory.from_state_dict(
                {name: channels_last(t) if t.ndim == 5 else t for name, t in parts[part].items()}
            )
            for part in ("encoding", "decoding")
        )
        self._cutter.load_state_dict(parts["cutter"])
        self._blender.load_state_dict(parts["blender"])
        self.frames_out = int(parts["stream"]["frames_out"])
        self._frame_shape = tuple(parts["stream"]["frame_shape"].tolist())

    def push(self, frame: np.ndarray) -> Iterator[np.ndarray]:
        """Take one uint8 or uint16 (H, W, 3) frame and return the frames that are ready.

        They are (t, H, W, 3), at the output size and in the requested depth.
        """
        number = self.frames_out + len(self._inputs)
        if self._frame_shape not in (None, frame.shape):
            raise ValueError(
                f"the frame size changes within the video, from {_size_text(self._frame_shape)} to "
                f"{_size_text(frame.shape)} at frame {number}"
            )
        self._frame_shape = frame.shape
        self._inputs.append(frame)
        if number < self._encoding.frames:
            return  # encoded before the state was saved: only its colours are still needed
        self._to_encode.append(frame)
        if len(self._to_encode) == self._sampling.slice_frames + self._encoding.at_start:
            yield from self._restore(self._cutter.push(self._encode()))

    def finish(self) -> Iterator[np.ndarray]:
        """The remaining frames, after the last one went in."""
        chunks = self._cutter.push(self._encode()) if self._to_encode else []
        yield from self._restore([*chunks, *self._cutter.finish()])
        rest = self._blender.finish()
        if rest is not None:
            yield from self._decode(rest)
        assert not self._inputs, f"{len(self._inputs)} frames were not restored"

    @torch.inference_mode()
    def _encode(self) -> Tensor:
        """The waiting frames' latent, fp32 (t, H', W', 16): a sample of the posterior, as in training."""
        with self._restorer.timed("pixels"):
            video = self._to_network(self._to_encode)
        self._to_encode = []
        vae, sampling = self._restorer.vae, self._sampling
        with self._restorer.timed("encode"):
            self._restorer.use(vae)
            start = self._cutter.end
            stream = vae.encode_stream(
                [video], sampling.slice_frames, self._encoding, self._band_pixels, self._tails_on_host
            )
            ((mean, log_variance),) = list(stream)
            _, channels, frames, height, width = mean.shape
            noise = frame_noise(sampling.seed, "posterior", start, (frames, height, width, channels))
            noise = noise.permute(3, 0, 1, 2)[None].to(self._restorer.device)
            latent = vae.to_latent(mean.float(), log_variance.float(), noise)
        return latent[0].permute(1, 2, 3, 0)

    def _restore(self, chunks: list[Chunk]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            with self._restorer.timed("transformer"):
                self._restorer.use(self._restorer.dit)
                ready = self._blender.add(self._restorer.denoise(chunk))
            yield from self._decode(ready)

    @torch.inference_mode()
    def _decode(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Frames of finished latents (t, H', W', 16), a slice at a time."""
        restorer = self._restorer
        slice_frames = self._sampling.slice_frames
        step = slice_frames // TEMPORAL_FACTOR
        while len(latent):
            first = step + self._decoding.at_start
            piece, latent = latent[:first], latent[first:]
            with restorer.timed("decode"):
                restorer.use(restorer.vae)
                z = piece.permute(3, 0, 1, 2)[None].to(restorer.dtype)
                height, width = self._padded
                stream = restorer.vae.decode_stream(
                    [z],
                    UNKNOWN_LENGTH,
                    height,
                    width,
                    slice_frames,
                    self._decoding,
                    self._band_pixels,
                    self._tails_on_host,
                )
                (video,) = list(stream)
            with restorer.timed("pixels"):
                count = min(video.shape[2], len(self._inputs))
                inputs = [self._inputs.popleft() for _ in range(count)]
                frames = self._to_frames(video[0, :, :count], inputs) if count else None
            if frames is not None:
                self.frames_out += count
                yield frames

    @property
    def _padded(self) -> tuple[int, int]:
        """Height and width of what the networks see."""
        height, width = self._size
        return height + -height % preprocess.SIDE_MULTIPLE, width + -width % preprocess.SIDE_MULTIPLE

    # One frame at a time, so that it stays in the CPU's caches between operations.

    def _resized(self, frame: np.ndarray) -> Tensor:
        """A uint8 or uint16 (H, W, 3) frame -> float (1, 3, height, width) in [0, 1] at the output size."""
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(self._restorer.device).float()
        unit = pixels.div_(np.iinfo(frame.dtype).max).permute(2, 0, 1)[None]
        return preprocess.resize(unit, *self._size)

    def _to_network(self, frames: list[np.ndarray]) -> Tensor:
        """(H, W, 3) frames -> (1, 3, t, H, W) in [-1, 1], resized, sides padded to multiples of 16."""
        video = torch.empty(
            (1, 3, len(frames), *self._padded),
            dtype=self._restorer.dtype,
            device=self._restorer.device,
            memory_format=torch.channels_last_3d,
        )
        for number, frame in enumerate(frames):
            padded = preprocess.pad_to_multiple(self._resized(frame))
            video[0, :, number] = preprocess.to_network(padded)[:, 0]
        return video

    def _to_frames(self, video: Tensor, inputs: list[np.ndarray]) -> np.ndarray:
        """Decoded (3, t, padded H, padded W) -> uint8 or uint16 (t, H, W, 3), trimmed, colours corrected."""
        height, width = self._size
        depth = np.uint16 if self._deep else np.uint8
        method = self._restorer.sampling.color_fix
        frames = np.empty((len(inputs), height, width, 3), depth)
        for number, own in enumerate(inputs):
            restored = video[:, number, :height, :width].float()[None]
            if method != "none":
                fix = colour_fix.wavelet_colour_fix if method == "wavelet" else colour_fix.adain_colour_fix
                restored = fix(restored, self._resized(own).mul_(2).sub_(1))
            unit = restored.clamp(-1, 1).mul_(0.5).add_(0.5)
            pixels = unit.mul_(np.iinfo(depth).max).round_()[0].permute(1, 2, 0)
            frames[number] = (pixels if self._deep else pixels.to(torch.uint8)).cpu().numpy()
        return frames


def _size_text(shape: tuple[int, ...] | None) -> str:
    assert shape is not None
    return f"{shape[1]}x{shape[0]}"
