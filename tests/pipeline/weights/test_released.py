"""Released checkpoints of every kind, at tiny widths: restore real files, fine-tune, convert."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model import checkpoints
from model.dit.nadit import SEEDVR_3B, SEEDVR_7B, NaDiT
from pipeline.data import precompute, text_embeddings
from pipeline.data.cropping import Bucket
from pipeline.restoration import restore
from pipeline.restoration.chunking import Chunk
from pipeline.restoration.restore import RestoreConfig, Restorer, Sampling
from pipeline.runtime.job_config import parse
from pipeline.store import delta_tables, parquet, schema, storage
from pipeline.training import convert
from pipeline.training.runs import train_dit, trainer
from pipeline.training.samples import latent_reader
from pipeline.training.samples.batch import training_sample
from pipeline.training.samples.sample_order import ScheduledSample
from pipeline.video import decoding
from pipeline.weights import backbones, weights_folder
from pipeline.weights.backbones import ModelConfig
from pipeline.weights.frame_noise import frame_noise
from tests.helpers import released_models
from tests.helpers.clips import MEDIA, make_video
from tests.helpers.data_root import make_data_root
from tests.helpers.processes import ROOT, output_of
from tests.helpers.ranks import train


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelConfig]:
    folder = tmp_path_factory.mktemp("released")
    return functools.cache(lambda kind: released_models.model_config(folder, kind))


# --- restore ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip, a clip of odd size, a video of one frame, and two images."""
    folder = tmp_path_factory.mktemp("in")
    frames = [f[40:104, 60:156] for f in decoding.decode_frames(str(MEDIA / "city.mp4"), max_frames=6)]
    odd = [f[:37, :53] for f in frames]
    (folder / "sub").mkdir()
    for name, clip in (("clip.mp4", frames), ("odd.mp4", odd[:3]), ("sub/one.mp4", frames[:1])):
        make_video(folder / name, clip)
    Image.fromarray(frames[0]).save(folder / "picture.jpg")
    Image.fromarray(np.ascontiguousarray(odd[0])).save(folder / "sub" / "small.png")
    return folder


EXPECTED = {
    "clip.mp4": (6, (64, 96)),
    "odd.mp4": (3, (37, 53)),
    "sub/one.mp4": (1, (64, 96)),
    "picture.png": (1, (64, 96)),
    "sub/small.png": (1, (37, 53)),
}


def check_written(output: Path) -> None:
    for name, (count, size) in EXPECTED.items():
        path = output / name
        if name.endswith(".png"):
            frames = [decoding.load_image(str(path))]
        else:
            frames = list(decoding.decode_frames(str(path)))
        assert len(frames) == count and frames[0].shape == (*size, 3), name
        assert frames[0].std() > 1, f"{name} is empty"


@pytest.mark.parametrize("kind", released_models.KINDS)
def test_every_kind_restores_clips_images_and_a_folder(kind, model_of, source, tmp_path):
    config = RestoreConfig(
        input=f"file://{source}",
        output=f"file://{tmp_path}",
        model=model_of(kind),
        sampling=Sampling(steps=2 if kind.startswith("seedvr-") else None, chunk_frames=5, overlap_frames=0),
        scale=1,
    )
    actor = restore.RestoreActor(config)
    for row in restore.list_inputs(config):
        result = actor({**row, "preview": False, "fingerprint": restore.fingerprint(config, row)})["result"]
        assert result["error"] is None, result["error"]
        assert result["model"] == kind and len(result["dit_sha256"]) == len(result["positive_sha256"]) == 64
    check_written(tmp_path)


def test_the_job_takes_a_released_model_from_the_command_line(model_of, source, tmp_path):
    """Prompts, sizes and steps as a user types them; without a size, the area of 720x1280."""
    model = model_of("seedvr2-3b")
    arguments = [
        *("--model.kind", "seedvr2-3b", "--model.weights", storage.path_of(model.weights)),
        *("--model.vae", model.vae, "--model.positive", str(model.positive)),
        *("--input", f"file://{source}", "--output", f"file://{tmp_path}"),
    ]
    parsed = parse(RestoreConfig, "restore", arguments)
    assert parsed.model.schedule == backbones.SEEDVR2
    assert parsed.output_size(36, 64) == (720, 1280)
    assert parsed.output_size(1080, 608) == (1279, 720)
    assert dataclasses.replace(parsed, scale=2).output_size(36, 64) == (72, 128)
    assert dataclasses.replace(parsed, area=(1080, 1920)).output_size(36, 64) == (1080, 1920)


def network_calls(restorer: Restorer, latent: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Network input, text and time of each call while a chunk is denoised."""
    calls = []
    hook = restorer.dit.register_forward_pre_hook(
        lambda _, inputs: calls.append((inputs[0].clone(), inputs[1], inputs[4].item()))
    )
    restorer.denoise(Chunk(0, latent))
    hook.remove()
    return calls


def test_each_kind_is_sampled_as_its_release_does(model_of):
    latent = torch.zeros(2, 4, 4, 16)
    seedvr = Restorer.from_weights(model_of("seedvr-3b"), device="cpu")
    calls = network_calls(seedvr, latent)
    assert [time for *_, time in calls[::2]] == pytest.approx([1000 - 20 * i for i in range(50)], abs=1e-3)
    assert [len(text) for _, text, _ in calls] == [6, 7] * 50  # both prompts in each step
    assert seedvr.schedule.guidance_scale == 6.5
    (call,) = network_calls(Restorer.from_weights(model_of("seedvr2-7b"), device="cpu"), latent)
    assert call[2] == 1000 and len(call[1]) == 6
    assert not call[0][:, 16:32].any()  # no noise on the condition
    assert (call[0][:, 32] == 1).all()


@pytest.mark.parametrize(("quirk", "time"), [(True, 137.2), (False, 108.4)])
def test_noise_on_the_condition_is_that_of_the_released_scripts(model_of, quirk, time):
    """6 latent frames of 64x64: the published code's 137.2; 108.4 is what it would be as intended."""
    model = dataclasses.replace(model_of("seedvr-3b"), shape_quirk=quirk)
    restorer = Restorer.from_weights(model, Sampling(steps=1, guidance_scale=1), device="cpu")
    ((video, _, _),) = network_calls(restorer, torch.zeros(6, 64, 64, 16))
    noise = frame_noise(0, "condition", 0, (6, 64, 64, 16)).flatten(0, 2)
    assert torch.allclose(1000 * video[:, 16:32] / noise, torch.tensor(time), atol=0.06)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positive": None}, r"model\.positive: seedvr-3b needs the prompt"),
        ({"kind": "own"}, r"model\.kind: .*single file"),
        ({"weights": "file:///folder"}, r"model\.weights: seedvr-3b is a file"),
        ({"vae": "weights/vae"}, r"model\.vae: .*relative"),
    ],
)
def test_wrong_models_name_their_key(wrong, message):
    good = {"weights": "/w.pth", "vae": "/vae.pth", "kind": "seedvr-3b", "positive": "/pos.pt"}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**good, **wrong})


def test_guidance_of_a_released_model_needs_its_negative_prompt():
    model = ModelConfig("/w.pth", vae="/vae.pth", kind="seedvr-3b", positive="/pos.pt")
    with pytest.raises(ValueError, match=r"guidance needs model\.negative"):
        RestoreConfig(input="/in", output="/out", model=model)
    one_step = dataclasses.replace(model, kind="seedvr2-3b")
    RestoreConfig(input="/in", output="/out", model=one_step)


@pytest.mark.parametrize(("kind", "shape"), [("seedvr2-3b", SEEDVR_3B), ("seedvr-7b", SEEDVR_7B)])
def test_a_file_of_another_model_is_told_in_one_line(kind, shape, tmp_path):
    """Bare .pth files state no shape: they are taken for the full size."""
    torch.save(NaDiT(released_models.SHAPES["3b"]).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"tiny\.pth: does not fit NaDiT: .*of another shape") as told:
        backbones.load_transformer(backbones.BackboneConfig(f"{tmp_path}/tiny.pth", kind), torch.float32)
    assert "\n" not in str(told.value)
    assert backbones.shape_of(backbones.BackboneConfig(f"{tmp_path}/tiny.pth", kind)) == shape


# --- fine-tuning ---


@pytest.fixture(scope="module")
def data(tmp_path_factory, model_of, local_ray) -> str:
    """Latents of the released autoencoder's file, with the fixed prompt."""
    model = model_of("seedvr-3b")
    url = make_data_root(tmp_path_factory.mktemp("data"), ["fig.jpg", "coffee.jpg"], ["cat.jpg"])
    precompute.run(
        precompute.PrecomputeConfig(
            data=url,
            vae=model.vae,
            fixed_text=text_embeddings.FixedTextConfig(str(model.positive), str(model.negative)),
            buckets=[Bucket(1, 64, 64)],
        )
    )
    return url


def test_the_fixed_prompt_is_by_reference_and_negative_when_dropped(data, model_of):
    text = delta_tables.open_table(f"{data}/{schema.TEXT}")
    assert text is not None
    (file, *_) = text.urls
    metadata = parquet.read_schema(file).metadata
    assert metadata[b"text"] == b"fixed"
    named = json.loads(metadata[b"openseedvr.fixed_text"])
    assert (
        named["negative"]["url"] == model_of("seedvr-3b").negative and len(named["positive"]["sha256"]) == 64
    )
    for row in parquet.read_table(file).to_pylist():
        assert row["clip_id"] and all(value is None for name, value in row.items() if name != "clip_id")
    reader = latent_reader.LatentReader(data)
    index = latent_reader.read_index(data).to_pylist()
    positive, negative = (backbones.read_prompt(named[name]["url"]).text for name in ("positive", "negative"))
    for drops, expected in (((False, True, True), positive), ((True, True, True), negative)):
        tokens, pooled = reader.prompt(index[0]["clip_id"], drops)
        assert torch.equal(tokens, expected) and len(pooled) == 0
    scheduled = [ScheduledSample(index[0], epoch) for epoch in range(100)]
    lengths = [len(training_sample(reader, sample, seed=0).text) for sample in scheduled]
    assert 2 <= lengths.count(7) <= 25  # P_DROP^3 is a tenth


def test_a_prompt_that_has_changed_since_is_refused(data, model_of):
    path = Path(storage.path_of(str(model_of("seedvr-3b").negative)))
    before = path.read_bytes()
    try:
        torch.save(torch.zeros(7, released_models.TEXT_DIM), path)
        with pytest.raises(ValueError, match=r"fixed_text\.negative: .*not the file"):
            latent_reader.LatentReader(data)
    finally:
        path.write_bytes(before)


def test_the_shipped_configs_need_only_the_files_named():
    """What the page on the released checkpoints says to type."""
    made = parse(
        precompute.PrecomputeConfig,
        "precompute",
        [
            *(
                "--config",
                str(ROOT / "configs/released/precompute.yaml"),
                "--data",
                "/run",
                "--vae",
                "/ema_vae.pth",
            ),
            *("--fixed_text.positive", "/pos_emb.pt", "--fixed_text.negative", "/neg_emb.pt"),
        ],
    )
    assert made.text is None and made.fixed_text.negative == "file:///neg_emb.pt"
    trained = parse(
        train_dit.TrainDitConfig,
        "train_dit",
        [
            *(
                "--config",
                str(ROOT / "configs/released/train_dit.yaml"),
                "--data",
                "/run",
                "--output",
                "/run",
            ),
            *("--initial.kind", "seedvr-3b", "--initial.weights", "/seedvr_ema_3b.pth"),
        ],
    )
    assert trained.initial == backbones.BackboneConfig("/seedvr_ema_3b.pth", "seedvr-3b")
    names = {bucket.name for bucket in made.buckets}
    assert all(set(stage.buckets) <= names for stage in trained.stages)


def tuning(data: str, model: ModelConfig, output: Path, **changes) -> train_dit.TrainDitConfig:
    values = {
        "initial": backbones.BackboneConfig(model.weights, model.kind),
        "stages": [train_dit.StageConfig("tune", ["1x64x64"], 2, learning_rate=1e-2, tokens_per_pack=64)],
        "heldout_triples": 2,
        "optimiser": trainer.OptimiserConfig(ema_decay=0.5),
        **changes,
    }
    return train_dit.TrainDitConfig(data=data, output=f"file://{output}", **values)


def test_data_that_does_not_fit_the_network_stops_before_ray(data, model_of, tmp_path):
    wide = dataclasses.replace(released_models.SHAPES["3b"], text_dim=40)
    checkpoints.save_backbone(tmp_path / "wide.safetensors", NaDiT(wide), {})
    initial = backbones.BackboneConfig(f"file://{tmp_path}/wide.safetensors", "seedvr-3b")
    with pytest.raises(ValueError, match="text/ is 24 wide, the network takes 40"):
        train_dit.check_data(tuning(data, model_of("seedvr-3b"), tmp_path, initial=initial))
    with pytest.raises(ValueError, match="model, initial: give exactly one"):
        tuning(data, model_of("seedvr-3b"), tmp_path, initial=None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["seedvr-3b", "seedvr-7b"])
def test_two_steps_change_the_weights_and_convert_back_bit_equal(kind, data, model_of, tmp_path):
    model = model_of(kind)
    train(1, tmp_path / "ranks", (train_dit.build, tuning(data, model, tmp_path)))
    before, _ = backbones.load_transformer(backbones.BackboneConfig(model.weights, kind), torch.float32)
    tuned, prompts = weights_folder.load_dit(f"file://{tmp_path}/weights/dit")
    changed = [name for name, p in tuned.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) > 0.9 * len(list(tuned.parameters()))
    assert prompts.positive is not None and (len(prompts.positive), len(prompts.null)) == (6, 7)
    (checkpoint,) = (tmp_path / "checkpoints/dit").glob("checkpoint_*/")
    for which in ("average", "raw"):
        for ending in ("pth", "safetensors"):
            output = f"file://{tmp_path}/{which}.{ending}"
            convert.run(convert.ConvertConfig(f"file://{checkpoint}", output, which=which))
        pth = checkpoints.load_nadit(tmp_path / f"{which}.pth", before.config)
        safe, _ = backbones.load_transformer(
            backbones.BackboneConfig(f"file://{tmp_path}/{which}.safetensors", kind), torch.float32
        )
        assert_equal(pth, safe)
        run_convert(source=checkpoint, output=tmp_path / which, which=which, data=data)
        folder, found = weights_folder.load_dit(f"file://{tmp_path}/{which}")
        assert_equal(pth, folder)
        assert found.positive is not None and torch.equal(found.positive, prompts.positive)
        if which == "average":
            assert_equal(folder, tuned)
        else:
            stored = load_file(checkpoint / "part-00000.safetensors")
            for name, parameter in folder.named_parameters():
                assert torch.equal(parameter.flatten(), stored[f"dit/master/{name}@0"]), name
            assert not torch.equal(folder.vid_out.proj.bias, tuned.vid_out.proj.bias)
    card = (tmp_path / "average" / convert.CARD).read_text()
    assert (
        '"step": 2' in card and f'"kind": "{kind}"' in card and "Apache-2.0" in card and "`width`: 32" in card
    )
    restorer = Restorer.from_weights(
        ModelConfig(f"file://{tmp_path}/weights/dit", vae=model.vae), Sampling(steps=1), device="cpu"
    )
    (frame,) = restorer.restore([np.full((20, 20, 3), 99, np.uint8)])
    assert frame.shape == (1, 20, 20, 3) and len(restorer.prompt.text) == 6


# --- convert ---


def run_convert(**settings) -> None:
    """As a user does it: a process."""
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    output_of("jobs.convert", *arguments)


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_file_to_folder_to_file_keeps_every_bit(model_of, tmp_path):
    model = model_of("seedvr2-7b")
    settings = {"kind": model.kind, "positive": model.positive, "negative": model.negative}
    convert.run(convert.ConvertConfig(model.weights, f"file://{tmp_path}/folder", **settings))
    convert.run(convert.ConvertConfig(f"file://{tmp_path}/folder", f"file://{tmp_path}/again.safetensors"))
    given = checkpoints.read_tensors(storage.path_of(model.weights))
    again = checkpoints.read_tensors(tmp_path / "again.safetensors")
    assert given.keys() == again.keys()
    assert all(torch.equal(t, again[n]) and t.dtype == again[n].dtype for n, t in given.items())
    card = (tmp_path / "folder" / convert.CARD).read_text()
    assert (
        "Apache-2.0" in card and "seedvr2-7b" in card and weights_folder.weights_hash(model.weights) in card
    )
    _, prompts = weights_folder.load_dit(f"file://{tmp_path}/folder")
    assert prompts.positive is not None and len(prompts.positive) == 6


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_autoencoder_and_another_precision(model_of, tmp_path, ending):
    model = model_of("seedvr-3b")
    output = f"file://{tmp_path}/vae16.{ending}"
    convert.run(convert.ConvertConfig(model.vae, output, kind="vae", dtype="float16"))
    given = checkpoints.read_tensors(storage.path_of(model.vae))
    made = checkpoints.read_tensors(tmp_path / f"vae16.{ending}")
    assert given.keys() == made.keys() and all(torch.equal(t.half(), made[n]) for n, t in given.items())
    size = sum(tensor.nbytes for tensor in made.values())
    assert (tmp_path / f"vae16.{ending}").stat().st_size < 1.2 * size + 2e5
    if ending == "safetensors":
        convert.run(convert.ConvertConfig(output, f"file://{tmp_path}/vae", kind="vae"))
        vae = weights_folder.load_vae(f"file://{tmp_path}/vae")
        assert torch.equal(vae.encoder.conv_in.weight, given["encoder.conv_in.weight"].half().float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "/a.pth", "output": "/b"}, "kind: "),
        ({"source": "/folder", "output": "/b", "kind": "vae"}, "kind: "),
        ({"source": "/a.pth", "output": "/b", "kind": "vae", "positive": "/p.pt"}, "positive, negative"),
    ],
)
def test_wrong_conversions_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        convert.ConvertConfig(**settings)


def test_a_folder_that_is_no_checkpoint_and_prompts_that_are_missing(model_of, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of dit here"):
        convert.run(convert.ConvertConfig(f"file://{tmp_path}", f"file://{tmp_path}/x.pth"))
    model = model_of("seedvr-3b")
    with pytest.raises(ValueError, match="carries its prompts"):
        convert.run(convert.ConvertConfig(model.weights, f"file://{tmp_path}/x", kind="seedvr-3b"))
