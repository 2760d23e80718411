"""The monosemanticity score against its quadratic definition, in any batching and for any sign of the codes; pooling, encoders, and what is refused."""
import math
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from sparsemax_sae import make_sae
from sparsemax_sae.activations.source import make_source
from sparsemax_sae.metrics.evaluate import ZeroPredictor, evaluate, metrics_table
from sparsemax_sae.metrics.monosemanticity import (POOLS, Monosemanticity, MonosemanticityMetric, as_pil, hf_encoder, image_embedder, monosemanticity,
                                                   monosemanticity_of, open_clip_encoder, per_image, unit)
from sparsemax_sae.metrics.reconstruction import NotApplicable
from sparsemax_sae.ops.codes import Codes, Pattern, counts_to_offsets
from sparsemax_sae.reproduce.paths import data_dir

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=30, deadline=None)


def definition(z, E):
    "Pair by pair, in plain Python: z (n, M) and unit E (n, e)."
    out, cos = [], (E @ E.T).tolist()
    for column in z.T.tolist():
        low, high = min(column), max(column)
        a = [(v - low) / (high - low) for v in column] if high > low else [0.]*len(column)
        pairs = [(a[i]*a[j], cos[i][j]) for i in range(len(a)) for j in range(i)]
        weight = math.fsum(w for w, _ in pairs)
        out.append(math.fsum(w*c for w, c in pairs) / weight if weight > 0 else math.nan)
    return torch.tensor(out, dtype=torch.float64)


def sparse(z, stored=None):
    "Codes of `z` stored as entries, with stored zeros where `stored` is True."
    mask = ((z != 0) if stored is None else (z != 0) | stored).reshape(-1, z.shape[-1])
    return Codes(z.reshape(-1, z.shape[-1])[mask], Pattern(mask.nonzero()[:, 1], counts_to_offsets(mask.sum(1)), z.shape[-1]), z.shape)


def total(z, E, cuts=(), codes=sparse):
    m, edges = Monosemanticity(), [0, *sorted(cuts), len(z)]
    for a, b in zip(edges, edges[1:]): m.update(codes(z[a:b]), E[a:b])
    return m


def random_case(seed, n=25, M=14, e=5, share=.3):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, M, generator=g) * (torch.rand(n, M, generator=g) < share)
    z[:, ::3] = z[:, ::3].abs()
    z[:, 1] = 5 + torch.rand(n, generator=g)                 # never zero
    z[:, 2] = -7 - torch.rand(n, generator=g)                # never zero, negative
    return z, unit(torch.randn(n, e, generator=g) + .5)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 25), max_size=4), st.booleans())
@few
def test_it_equals_the_definition_however_it_is_batched(seed, cuts, dense):
    z, E = random_case(seed)
    m = total(z, E, cuts, Codes.from_dense if dense else sparse)
    torch.testing.assert_close(m.scores(), definition(z.double(), E), rtol=1e-8, atol=1e-9, equal_nan=True)
    assert m.n == 25 and torch.equal(m.fires, (z != 0).sum(0))
    off = ~torch.eye(25, dtype=torch.bool)
    assert m.chance() == pytest.approx((E @ E.T)[off].mean().item(), rel=1e-9)


@given(st.integers(0, 10**6))
@few
def test_it_does_not_depend_on_scale_order_or_stored_zeros(seed):
    z, E = random_case(seed)
    g = torch.Generator().manual_seed(seed)
    p, scale = torch.randperm(25, generator=g), 10**torch.empty(14).uniform_(-3, 3, generator=g)
    reference = total(z, E).scores()
    stored = torch.rand(z.shape, generator=g) < .3
    for other in (total(z*scale, E), total(z[p], E[p]), total(z, 3*E), total(z, E, codes=lambda a: sparse(a, stored[:len(a)]))):
        torch.testing.assert_close(other.scores(), reference, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_no_score_where_no_two_images_share_a_concept():
    E, z = unit(torch.randn(40, 6)), torch.zeros(40, 7, dtype=torch.float64)
    z[:, 1], z[3, 2], z[:, 3], z[3, 3], z[:, 4], z[5, 4] = 1/3, 2, 1/3, .5, -1/3, 1e5
    z[[0, 9], 5], z[:, 6], z[2:4, 6] = torch.tensor([1., 1e-4]).double(), 1/3, .4
    s = total(z, E, (1, 17)).scores()
    assert s.isnan().tolist() == [True]*5 + [False]*2
    torch.testing.assert_close(s[5:], torch.stack([E[0] @ E[9], E[2] @ E[3]]), rtol=1e-9, atol=1e-9)


def test_a_large_offset_does_not_hide_the_score():
    z, E = torch.rand(60, 3).double(), unit(torch.randn(60, 6))
    for offset in (1e3, -1e3, 1e4):
        torch.testing.assert_close(total(z + offset, E, (20,)).scores(), definition(z, E), rtol=1e-5, atol=1e-6)


def test_few_images():
    E = unit(torch.randn(2, 3))
    one, two = Monosemanticity(), total(torch.ones(2, 1) * torch.tensor([[1.], [3.]]), E)
    one.update(Codes.from_dense(torch.ones(1, 1)), E[:1])
    assert math.isnan(one.chance()) and one.scores().isnan().all() and two.scores().isnan().all()
    assert two.chance() == pytest.approx((E[0] @ E[1]).item())
    two.update(Codes.from_dense(torch.zeros(0, 1)), E[:0])
    assert two.n == 2
    with pytest.raises(ValueError, match="no images"): Monosemanticity().scores()


@pytest.mark.parametrize("codes, E, message", [
    (torch.ones(3, 4), torch.ones(2, 5), "one embedding per image"),
    (torch.ones(3, 4), torch.zeros(3, 5), "zero or not finite"),
    (torch.ones(3, 4), torch.full((3, 5), torch.nan), "zero or not finite"),
    (torch.ones(3, 4), torch.ones(3), "one row per image"),
    (torch.ones(3, 6), torch.ones(3, 5), "one SAE with one encoder"),
    (torch.ones(3, 4), torch.ones(3, 6), "one SAE with one encoder")])
def test_what_does_not_fit_is_refused(codes, E, message):
    m = total(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=message): m.update(Codes.from_dense(codes), E)
    assert m.n == 3


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1))
@few
def test_pooling_is_what_the_dense_reduction_gives(seed, B, T, share):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, T, 9, generator=g) * (torch.rand(B, T, 9, generator=g) < share)
    z[..., 0] = -z[..., 0].abs()
    for pool, truth in dict(max=z.amax(1), mean=z.mean(1), cls=z[:, 0]).items():
        for codes in (sparse(z, torch.rand(z.shape, generator=g) < .2), Codes.from_dense(z)):
            pooled = per_image(codes, pool)
            assert pooled.shape == (B, 9)
            torch.testing.assert_close(pooled.to_dense().float(), truth, rtol=1e-5, atol=1e-7)


def test_pooling_in_half_precision():
    z = (torch.rand(3, 5, 8) * (torch.rand(3, 5, 8) < .5)).bfloat16()
    torch.testing.assert_close(per_image(sparse(z), "mean").to_dense(), z.double().mean(1))
    torch.testing.assert_close(per_image(sparse(z)).to_dense().bfloat16(), z.amax(1))


@pytest.mark.parametrize("make", [
    lambda t, folder: t.ViTModel(t.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16)),
    lambda t, folder: t.Dinov2Model(t.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)),
    lambda t, folder: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1])),
    lambda t, folder: t.CLIPModel(t.CLIPConfig(projection_dim=16,
        text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99),
        vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16)))],
    ids=["vit", "dinov2", "resnet", "clip"])
def test_hugging_face_encoders(make, tmp_path):
    import transformers as t
    make(t, tmp_path).save_pretrained(tmp_path); t.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path)
    encode, images = hf_encoder(tmp_path, batch_size=2), torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    E = encode(images)
    assert E.shape == (3, 16) and E.isfinite().all() and not E.requires_grad
    torch.testing.assert_close(encode(as_pil(images)), E)
    torch.testing.assert_close(encode(images[1:2]), E[1:2], rtol=1e-4, atol=1e-5)


def test_a_folder_without_an_image_processor(tmp_path):
    from transformers import ViTConfig, ViTModel
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no image processor"): hf_encoder(tmp_path)
    with pytest.raises(OSError): hf_encoder(tmp_path/"nowhere")


@pytest.fixture(scope="module")
def source(): return make_source("scenes", device="cpu")


@pytest.fixture(scope="module")
def sae(source):
    torch.manual_seed(0)
    return make_sae("topk", source.d_in, 256, k=6)


def test_who_judges(source):
    batch = source.data.load("test", [4, 2])
    encode, by = image_embedder(None, source)
    assert "known attributes" in by and torch.equal(encode(batch), source.data.describe("test", [4, 2]))
    encode, _ = image_embedder(data_dir("backbones", "tiny-clip"), source)
    torch.testing.assert_close(encode(batch), source.embeddings(batch.images), rtol=1e-4, atol=1e-5)
    assert open_clip_encoder("facebook/dinov2-base", source) is None
    for name in ("ViT-B-32", "ViT-B/32"):
        with pytest.raises(ValueError, match=f"random weights.*{name}:"): image_embedder(name, source)
    with pytest.raises(ValueError, match="no pretrained weights 'openia'.*Did you mean 'openai'"): image_embedder("ViT-B-32:openia", source)


def test_pictures_that_nothing_is_known_of_are_judged_by_the_source(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30): Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    source = make_source(tmp_path, device="cpu")
    encode, by = image_embedder(None, source)
    batch = source.data.load("test", [0])
    assert "not independent" in by and torch.equal(encode(batch), source.embeddings(batch.images))


@pytest.mark.parametrize("pool", POOLS)
def test_scores_of_an_sae_are_those_of_its_codes(source, sae, pool):
    i = source.data.sample("test", 40)
    z = sae.eval().encode(source.activations(source.data.load("test", i).images)).to_dense().detach()
    z = dict(max=z.amax(1), mean=z.mean(1), cls=z[:, 0])[pool]
    truth, s = definition(z.double(), unit(source.data.describe("test", i))), monosemanticity(sae, source, 40, pool=pool, batch_size=17)
    assert s.shape == (256,) and s.dtype == torch.float64
    torch.testing.assert_close(s, truth, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_dense_codes(source):
    relu = make_sae("relu", source.d_in, 64)
    i = source.data.sample("test", 20)
    z = relu.eval().encode(source.activations(source.data.load("test", i).images)).to_dense().detach().amax(1)
    torch.testing.assert_close(monosemanticity(relu, source, 20, batch_size=7), definition(z.double(), unit(source.data.describe("test", i))), rtol=1e-3, atol=1e-3, equal_nan=True)


def test_the_metric(source, sae):
    sae.train()
    result = evaluate(sae, source, n=64, n_sequences=4, metrics=["monosemanticity"])
    assert sae.training
    m = monosemanticity_of(sae, source, 32)
    s = m.scores()[~m.scores().isnan()]
    assert result == pytest.approx(dict(mean_ms=s.mean().item(), median_ms=s.median().item(), max_ms=s.max().item(), ms_random=m.chance(), ms_concepts=len(s)))
    table = metrics_table(sae, source, n=64, n_sequences=4, metrics=["mean_ms", "l0"], mean=torch.zeros(source.d_in))
    assert table.mean_ms.isna().tolist() == [False, True, True] and set(table.attrs["omitted"]) == {"mean", "zero"}


def test_where_it_is_not_applicable(source, sae):
    vectors = make_source(torch.randn(20, 8))
    small = make_sae("topk", 8, 16, k=2)
    assert "compares images" in evaluate(small, vectors, n=8).omitted["monosemanticity"]
    with pytest.raises(NotApplicable, match="compares images"): evaluate(small, vectors, n=8, metrics="mean_ms")
    with pytest.raises(NotApplicable, match="no concepts"): MonosemanticityMetric().measure(ZeroPredictor(), source, 4)
    with pytest.raises(ValueError, match="needs the CLS token"): monosemanticity(sae, make_source("scenes", tokens="patches", device="cpu"), 8, pool="cls")
    with pytest.raises(ValueError, match="pool='mx'"): monosemanticity(sae, source, 8, pool="mx")
    with pytest.raises(ValueError, match="n"): monosemanticity(sae, source, 0)


def test_memory_does_not_grow_with_images_times_concepts():
    "49,152 concepts and 2,000 images in sparse codes: dense they would be 786 MB."
    import resource
    g, M = torch.Generator().manual_seed(0), 49152
    before, m = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Monosemanticity()
    for _ in range(8):
        index = torch.randint(M, (250, 30), generator=g).sort(1).values
        index = index + torch.arange(30)                          # distinct within an image
        codes = Codes(torch.rand(250*30, generator=g), Pattern((index % M).reshape(-1), torch.arange(0, 250*30 + 1, 30), M), (250, M))
        m.update(codes, torch.randn(250, 16, generator=g))
    assert (m.scores().isnan() == (m.fires < 2)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000   # kB
