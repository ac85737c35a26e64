"""The three encoders' embeddings and how a sample's text is made of them."""

import json

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from model import text_encoders
from model.dit import swin_mmdit


@pytest.fixture(scope="module")
def encoders() -> text_encoders.TextEncoders:
    torch.set_num_threads(1)
    return text_encoders.TextEncoders(text_encoders.TINY_ENCODERS, device="cpu")


PARTS = ("clip_l", "clip_g", "t5", "pooled_l", "pooled_g")
LONG = "a very long caption of a street at night, " * 40


def test_true_lengths(encoders):
    empty, cat, long = encoders.encode(["", "a cat", LONG])
    assert (len(empty.clip_l), len(empty.t5)) == (2, 1)  # start and end; end
    assert (len(cat.clip_l), len(cat.clip_g), len(cat.t5)) == (4, 4, 6)  # T5's tiny stand-in counts bytes
    assert (len(long.clip_l), len(long.t5)) == (text_encoders.CLIP_MAX_TOKENS, text_encoders.T5_MAX_TOKENS)


def test_a_caption_is_encoded_alike_whoever_is_beside_it(encoders):
    alone = encoders.encode(["a cat"])[0]
    beside = encoders.encode([LONG, "a cat", ""])[1]
    again = text_encoders.TextEncoders(text_encoders.TINY_ENCODERS, device="cpu").encode(["a cat"])[0]
    for part in PARTS:
        assert torch.equal(getattr(alone, part), getattr(beside, part)), part
        assert torch.equal(getattr(alone, part), getattr(again, part)), part


def test_captions_differ_in_every_encoder(encoders):
    cat, dog = encoders.encode(["a cat", "a dog"])
    for part in PARTS:
        assert not torch.allclose(getattr(cat, part), getattr(dog, part), atol=1e-3), part


def test_clip_states_are_those_before_the_last_layer(encoders):
    """Zeroing the last layer changes the pooled vector and not the states."""
    other = text_encoders.TextEncoders(text_encoders.TINY_ENCODERS, device="cpu")
    for parameter in other.clip_g.transformer.resblocks[-1].parameters():
        parameter.zero_()
    before, after = encoders.encode(["a cat"])[0], other.encode(["a cat"])[0]
    assert torch.equal(before.clip_g, after.clip_g) and not torch.allclose(before.pooled_g, after.pooled_g)


def test_clip_states_are_not_normalised(encoders):
    """SD3 takes the residual stream itself after the last layer but one: written out."""
    tower = encoders.clip_g
    tokens = encoders.clip_tokenizer(["a cat"])[:, :4]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:4]
    for layer in tower.transformer.resblocks[:-1]:
        x = layer(x, attn_mask=tower.attn_mask[:4, :4])
    assert torch.allclose(encoders.encode(["a cat"])[0].clip_g, x[0], atol=1e-5)


def test_clip_agrees_with_open_clip_itself(encoders):
    tower = encoders.clip_l
    tokens = encoders.clip_tokenizer(["two boats, seen from above"])
    embedding = encoders.encode(["two boats, seen from above"])[0]
    assert torch.allclose(embedding.pooled_l, tower(tokens)[0], atol=1e-6)


def test_join_lays_out_as_sd3(encoders):
    null, cat = encoders.encode(["", "a cat"])
    joined, pooled = text_encoders.join(cat, null, drop_l=False, drop_g=False, drop_t5=False)
    assert joined.shape == (4 + 6, swin_mmdit.TINY.text_dim) and pooled.shape == (swin_mmdit.TINY.pooled_dim,)
    assert torch.equal(joined[:4, :16], cat.clip_l) and torch.equal(joined[:4, 16:48], cat.clip_g)
    assert not joined[:4, 48:].any() and torch.equal(joined[4:], cat.t5)
    assert torch.equal(pooled, torch.cat([cat.pooled_l, cat.pooled_g]))


@pytest.mark.parametrize("drop", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_each_encoder_drops_on_its_own(encoders, drop):
    null, cat = encoders.encode(["", "a cat"])
    joined, pooled = text_encoders.join(cat, null, *map(bool, drop))
    from_l, from_g, from_t5 = (null if dropped else cat for dropped in drop)
    clips = max(len(from_l.clip_l), len(from_g.clip_g))
    assert len(joined) == clips + len(from_t5.t5)
    assert torch.equal(joined[: len(from_l.clip_l), :16], from_l.clip_l)
    assert not joined[len(from_l.clip_l) : clips, :16].any()
    assert torch.equal(joined[: len(from_g.clip_g), 16:48], from_g.clip_g)
    assert not joined[len(from_g.clip_g) : clips, 16:48].any()
    assert torch.equal(joined[clips:], from_t5.t5)
    assert torch.equal(pooled, torch.cat([from_l.pooled_l, from_g.pooled_g]))


def test_all_dropped_is_the_negative_prompt(encoders):
    null, cat = encoders.encode(["", "a cat"])
    dropped, negative = (
        text_encoders.join(cat, null, True, True, True),
        text_encoders.join(null, null, False, False, False),
    )
    assert torch.equal(dropped[0], negative[0]) and torch.equal(dropped[1], negative[1])


def test_encoders_from_folders(encoders, tmp_path):
    """The way of real weights: open_clip's and transformers' own folder layouts."""
    clip_config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    clip_folder, t5_folder = tmp_path / "clip", tmp_path / "t5"
    clip_folder.mkdir()
    (clip_folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip_config}))
    clip = open_clip.model.CLIP(**clip_config)
    clip.token_embedding.weight.data.normal_()
    save_file(clip.state_dict(), clip_folder / "open_clip_model.safetensors")
    encoders.t5.save_pretrained(t5_folder)
    transformers.ByT5Tokenizer().save_pretrained(t5_folder)
    config = text_encoders.TextEncoderConfig(
        clip_l=str(clip_folder), clip_g=text_encoders.TINY, t5=str(t5_folder)
    )
    loaded = text_encoders.TextEncoders(config, device="cpu")
    ours, tiny = loaded.encode(["a cat"])[0], encoders.encode(["a cat"])[0]
    tokens = loaded.clip_tokenizer(["a cat"])
    assert torch.allclose(ours.pooled_l, clip.eval().encode_text(tokens)[0], atol=1e-6)
    assert torch.equal(ours.t5, tiny.t5) and torch.equal(ours.clip_g, tiny.clip_g)


def test_drop_rate_and_independence():
    generator = torch.Generator().manual_seed(0)
    drops = torch.tensor([text_encoders.draw_drops(generator) for _ in range(4000)], dtype=torch.float32)
    assert ((drops.mean(0) - 0.464).abs() < 0.03).all()
    assert (torch.corrcoef(drops.T) - torch.eye(3)).abs().max() < 0.06
