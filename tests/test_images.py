"""Vision activations: the way to the hook and back, the order of the patches, pixels, loading, splices, prototypes, the source protocol, and what is said about mistakes."""
import io, itertools, json, logging, shutil
from functools import partial
from pathlib import Path
import datasets, numpy as np, open_clip, pytest, torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from sparsemax_sae.activations.images import ImageSource, clip_digest, is_clip_name, load_clip
from sparsemax_sae.activations.pictures import Batch, Pictures, open_pictures
from sparsemax_sae.activations.source import NotGraded, find_source, make_source
from sparsemax_sae.activations.store import ActivationStore, StoreSource
from sparsemax_sae.activations.text import TextSource
from sparsemax_sae.reproduce.paths import data_dir, root

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = dict(device="cpu")
CIFAR = root().parent/"shared"/"data"/"cifar10"
SMALL = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16)
TEXT = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)

def take(it, n): return list(itertools.islice(it, n))
def unit(x): return F.normalize(x, dim=-1)
def whole(source, images):
    with torch.no_grad(): return unit(source.model.encode_image(source.pixels(images)))

# ------------------------------------------------------------------ little models and pictures

def clip(seed=0, size=32, preprocess={}, **vision):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=dict(SMALL, **vision), text_cfg=TEXT)
        for p in model.visual.parameters(): p.data += .02*torch.randn_like(p)     # nothing is zero or one by initialisation
    open_clip.set_model_preprocess_cfg(model, vars(PreprocessCfg(size=size, **preprocess)))
    return model.eval()

@pytest.fixture(scope="session")
def model(): return clip()

class Noise(Pictures):
    "Random images, tensors or PIL, of which some are corrupt."
    name, classes = "noise", ["a", "b"]
    def __init__(self, n=20, size=32, pil=False, corrupt=lambda split, i: False):
        super().__init__(["a", "b"], ["a photo of {}"])
        self.shape, self.pil, self.bad, self.sizes, self.loads = (3, size, size), pil, corrupt, dict(train=n, count=4, test=8), []
        self.fingerprint = dict(noise=n, size=size, pil=pil)
    def load(self, split, indices):
        i = torch.as_tensor(indices, dtype=torch.long)
        i = i[torch.tensor([not self.bad(split, int(j)) for j in i], dtype=torch.bool)]
        self.loads.append(len(i))
        make = lambda j: torch.randint(256, self.shape, generator=torch.Generator().manual_seed(["train", "count", "test"].index(split)*10**6 + j), dtype=torch.uint8)
        images = torch.stack([make(int(j)) for j in i]) if len(i) else torch.zeros(0, *self.shape, dtype=torch.uint8)
        if self.pil: images = [Image.fromarray(im.permute(1, 2, 0).numpy()) for im in images]
        return Batch(images, i % 2, i)

@pytest.fixture
def source(model):
    def make(data=None, **options): return ImageSource(data or Noise(), **dict(dict(model=model, block_size=6, model_batch=4), **CPU, **options))
    return make

@pytest.fixture
def images(): return Noise().load("test", range(6)).images

@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for c in ("red_fox", "owl"):
        (tmp_path/"photos"/c).mkdir(parents=True)
        for i in range(15): Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path/"photos"/c/f"{i}.png")
    return tmp_path/"photos"

# ------------------------------------------------------------------ to the hook and back

VARIANTS = dict(plain={}, average=dict(pool_type="avg"), late_norm=dict(final_ln_after_pool=True), no_norm_before=dict(no_ln_pre=True), attention_pool=dict(attentional_pool=True),
                custom_block=dict(block_type="custom"), patch_dropout=dict(patch_dropout=.5), layer_scale=dict(ls_init_value=.1), fixed_positions=dict(pos_embed_type="sin_cos_2d"))

@pytest.mark.parametrize("variant", VARIANTS)
def test_both_halves_are_the_model(variant):
    m = clip(**VARIANTS[variant])
    images = Noise().load("test", range(5)).images
    for layer, hook in itertools.product(range(3), ("pre", "post")):
        s = ImageSource(Noise(), model=m, layer=layer, hook=hook, **CPU)
        x = s.residual(s.pixels(images))
        assert x.shape == (5, 17, 32) and x.dtype == torch.float32
        assert torch.allclose(s.finish(x), whole(s, images), atol=1e-6) and torch.allclose(s.embeddings(images), whole(s, images), atol=1e-6)

def test_an_image_that_is_not_square():
    m = clip(size=(16, 32), image_size=(16, 32), patch_size=8)
    s = ImageSource(Noise(), model=m, layer=1, **CPU)
    images = torch.randint(256, (2, 3, 16, 32), dtype=torch.uint8)
    assert s.grid == (2, 4) and s.n_tokens == 9 and s.pixels(images).shape == (2, 3, 16, 32) and torch.allclose(s.embeddings(images), whole(s, images), atol=1e-6)
    lit = torch.zeros(1, 3, 16, 32, dtype=torch.uint8); lit[..., 8:, 16:24] = 255
    early = ImageSource(Noise(), model=m, layer=0, hook="pre", **CPU)
    assert (early.activations(lit) - early.activations(0*lit)).norm(dim=-1)[0].nonzero().tolist() == [[1 + 4 + 2]]

def test_only_the_blocks_that_are_needed_run(model, source, images):
    ran = []
    handles = [b.mlp.register_forward_hook(lambda *a, i=i: ran.append(i)) for i, b in enumerate(model.visual.transformer.resblocks)]
    try:
        s = source(layer=1)
        x = s.residual(s.pixels(images[:2])); first = ran[:]; ran.clear()
        s.finish(x)
        assert first == [0, 1] and ran == [2]
    finally:
        for h in handles: h.remove()

def test_pre_is_the_post_of_the_block_before(source, images):
    assert torch.equal(source(layer=2, hook="pre").activations(images), source(layer=1, hook="post").activations(images))

@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
@pytest.mark.parametrize("hook", ["pre", "post"])
def test_the_identity_changes_nothing_at_all(source, images, tokens, hook):
    s = source(tokens=tokens, hook=hook)
    plain, seen = s.embeddings(images), []
    assert torch.equal(plain, s.embeddings(images, edit=lambda x: seen.append(x) or x.clone())) and torch.equal(torch.cat(seen), s.activations(images))
    assert torch.allclose(plain, whole(s, images), atol=1e-6) and torch.allclose(plain.norm(dim=1), torch.ones(6)) and s.n_tokens == seen[0].shape[1]
    assert (plain - s.embeddings(images, edit=torch.zeros_like)).abs().max() > 1e-3
    assert torch.equal(plain, s.embeddings(images))

def test_tokens_chosen_and_put_back(source, images):
    every, cls, patches = (source(tokens=t) for t in ("all", "cls", "patches"))
    x = every.activations(images)
    assert torch.equal(cls.activations(images), x[:, :1]) and torch.equal(patches.activations(images), x[:, 1:]) and (every.n_tokens, cls.n_tokens, patches.n_tokens) == (17, 1, 16)
    y = torch.randn_like(x)
    assert torch.equal(every.merge(x, y), y) and torch.equal(cls.merge(x, y[:, :1]), torch.cat([y[:, :1], x[:, 1:]], 1)) and torch.equal(patches.merge(x, y[:, 1:]), torch.cat([x[:, :1], y[:, 1:]], 1))
    for bad in (x, x[:, :1, :5], None, (x[:, :1],)):
        with pytest.raises(ValueError, match=r"must have the shape they were given with, \(6, 1, 32\)"): cls.merge(x, bad)
    with pytest.raises(ValueError, match="must have the shape"): every.embeddings(images, edit=lambda x: x[:, 1:])
    assert torch.equal(every.merge(x, x.double()), x)

@pytest.mark.parametrize("row, column", [(0, 0), (0, 3), (1, 2), (3, 0), (3, 3)])
def test_the_order_of_the_patches(source, row, column):
    lit = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    lit[..., 8*row:8*row+8, 8*column:8*column+8] = 255
    s = source(layer=0, hook="pre", tokens="patches")
    change = (s.activations(lit) - s.activations(0*lit)).norm(dim=-1).view(s.grid)
    assert change.nonzero().tolist() == [[row, column]]

def test_pieces_give_what_the_whole_gives(source, images):
    one, all_ = source(model_batch=1), source(model_batch=64)
    assert torch.allclose(one.activations(images), all_.activations(images), atol=1e-5) and torch.allclose(one.embeddings(images), all_.embeddings(images), atol=1e-5)

def test_no_gradients_and_no_inference_tensors(source, images):
    s = source()
    x = s.activations(images)
    w = torch.ones(32, requires_grad=True)
    (x*w).sum().backward()
    assert not x.requires_grad and w.grad is not None and not s.embeddings(images, edit=lambda x: x*w).requires_grad and not any(p.requires_grad for p in s.model.parameters())

def test_no_images_at_all(source):
    s, none = source(tokens="patches"), torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    assert s.activations(none).shape == s.activations([]).shape == (0, 16, 32) and s.embeddings(none).shape == s.embeddings([]).shape == (0, 16)
    assert list(s.run("test", [])) == []

def test_half_precision(model, images):
    s = ImageSource(Noise(), model=clip(), dtype="bfloat16", **CPU)
    x = s.activations(images)
    assert x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float()) and s.fingerprint()["dtype"] == "bfloat16"
    e = s.embeddings(images)
    assert torch.allclose(e.norm(dim=1), torch.ones(6)) and torch.equal(e, s.embeddings(images, edit=lambda x: x.clone())) and torch.allclose(e, whole(ImageSource(Noise(), model=model, **CPU), images), atol=.1)
    assert unit(s.prototypes(["a"], ["{}"])).dtype == torch.float32

def test_wrong_shapes(source, images):
    s = source()
    with pytest.raises(ValueError, match=r"takes pixels of shape \(B, 3, 32, 32\).*got \(6, 3, 16, 16\)"): s.residual(s.pixels(images)[..., :16, :16])
    with pytest.raises(ValueError, match=r"finish takes all tokens \(B, 17, 32\); got \(6, 16, 32\)"): s.finish(s.residual(s.pixels(images))[:, 1:])

# ------------------------------------------------------------------ pixels

@pytest.mark.parametrize("cfg", [dict(resize_mode=m, interpolation=i) for m in ("shortest", "longest", "squash") for i in ("bicubic", "bilinear")] + [dict(mean=(.5, .5, .5), std=(.25, .3, .2))])
def test_the_short_cut_is_the_long_way(images, cfg):
    s = ImageSource(Noise(), model=clip(preprocess=cfg), **CPU)
    pils = [Image.fromarray(im.permute(1, 2, 0).numpy()) for im in images]
    assert torch.equal(s.pixels(images), s.pixels(pils))
    other = torch.randint(256, (2, 3, 20, 50), dtype=torch.uint8)
    expected = torch.stack([image_transform_v2(PreprocessCfg(**s.visual.preprocess_cfg), is_train=False)(Image.fromarray(im.permute(1, 2, 0).numpy())) for im in other])
    assert torch.equal(s.pixels(other), expected) and expected.shape == (2, 3, 32, 32)

def test_images_of_every_mode(source):
    s, grey = source(), Image.fromarray(np.linspace(0, 255, 40, dtype=np.uint8)[None].repeat(40, 0))
    expected = s.pixels([grey.convert("RGB")])
    assert torch.equal(s.pixels([grey, grey.convert("RGBA"), grey.convert("LA")]), expected.expand(3, -1, -1, -1)) and torch.equal(s.pixels(grey), expected)
    assert torch.equal(s.pixels([Image.fromarray(np.asarray(grey).astype(np.uint16)*257)]), expected)

@pytest.mark.parametrize("bad", [torch.rand(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)])
def test_other_tensors_are_no_images(source, bad):
    with pytest.raises(ValueError, match=r"images are uint8 of shape \(B, 3, H, W\), or a list of PIL images; got"): source().pixels(bad)

def test_a_preprocess_of_ones_own(model, images):
    asked = []
    def preprocess(im): asked.append(im.size); return torch.full((3, 32, 32), im.size[0]/32)
    s = ImageSource(Noise(), model=model, preprocess=preprocess, **CPU)
    assert torch.equal(s.pixels(images), torch.ones(6, 3, 32, 32)) and len(asked) == 6 and "0x" not in json.dumps(s.fingerprint())
    bare = open_clip.CLIP(embed_dim=16, vision_cfg=SMALL, text_cfg=TEXT)
    with pytest.raises(ValueError, match="pass preprocess="): ImageSource(Noise(), model=bare, **CPU)
    assert ImageSource(Noise(), model=bare, preprocess=preprocess, **CPU).d_in == 32

# ------------------------------------------------------------------ the source protocol

def rows(x): return sorted(map(tuple, x.tolist()))

def test_the_stream_resumes_bit_for_bit(source):
    for data in (Noise(), Noise(pil=True, corrupt=lambda split, i: i % 3 == 0)):
        run = take(source(data).stream(50, seed=5), 25)
        for i in (0, 3, 7, 20):
            again = take(source(data).stream(50, seed=5, cursor=json.loads(json.dumps(run[i][1]))), 24 - i)
            assert all(torch.equal(a, b) and c == d for (a, c), (b, d) in zip(again, run[i+1:]))
    assert not torch.equal(next(source().stream(50, seed=6))[0], run[0][0])

def test_an_epoch_holds_every_token_once(source):
    s = source()
    expected = torch.cat([x.flatten(0, 1) for _, x in s.run("train", range(20))])
    epochs = [next(s.stream(20*17, seed=1))[0], torch.cat([x for x, _ in take(s.stream(17, seed=1), 40)[20:]])]
    for x in epochs: assert np.allclose(rows(x), rows(expected), atol=1e-4)
    assert not torch.allclose(*epochs)

def test_heldout_is_fixed_and_apart(source):
    s = source()
    x = torch.cat(list(s.heldout(10**6)))
    assert len(x) == 8*17 and torch.equal(x, torch.cat(list(s.heldout(10**6, batch_size=10)))) and torch.equal(x[:50], torch.cat(list(s.heldout(50, batch_size=7))))
    assert torch.equal(x, torch.cat([y.flatten(0, 1) for _, y in s.run("test", s.data.sample("test", 8), batch_size=4)]))

def test_no_more_than_a_piece_of_the_images_is_ever_there(source):
    s = source(block_size=18, model_batch=4)
    next(s.stream(10)); next(s.heldout(10)); take(s.run("train", range(10), batch_size=3), 2)
    assert max(s.data.loads) == 4

def test_corrupt_images_are_passed_over(source):
    s = source(Noise(corrupt=lambda split, i: i >= 5))
    assert all(len(b) for b, _ in s.run("train", range(20), batch_size=2)) and sum(len(b) for b, _ in s.run("train", range(20), batch_size=2)) == 5
    x = torch.cat([x for x, _ in take(s.stream(5*17), 2)])
    assert np.allclose(rows(x[:85]), rows(x[85:]), atol=1e-4)

@pytest.mark.parametrize("start", [0, 2])
def test_an_epoch_without_any_good_image_is_an_error(source, start):
    s = source(Noise(corrupt=lambda split, i: True))
    with pytest.raises(ValueError, match="none of the 20 training images of noise can be decoded"): s.block(0, dict(epoch=0, block=start))
    with pytest.raises(ValueError, match="none of the test images of noise"): next(s.heldout(10))

def test_corrupt_files_end_to_end(photos, model):
    for f in list(photos.rglob("*.png"))[::3]: f.write_bytes(f.read_bytes()[:40])
    s = ImageSource(photos, model=model, block_size=4, **CPU)
    with pytest.warns(UserWarning, match="cannot be decoded"): x = [x for x, _ in take(s.stream(17), 30)] + list(s.heldout(10**4))
    assert torch.cat(x).isfinite().all() and s.data.skipped > 0
    for f in photos.rglob("*.png"): f.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the .* training images of photos can be decoded"), pytest.warns(UserWarning): next(ImageSource(photos, model=model, **CPU).stream(5))

def test_grading(source):
    scenes = ImageSource("counts", **CPU)
    assert scenes.graded_by == scenes.data.complexity_is
    (b, x), (y, complexity) = next(scenes.run("test", scenes.data.sample("test", 5))), next(scenes.graded(5*65, 5*65))
    assert torch.equal(complexity.view(5, 65), b.complexity[:, None].expand(-1, 65)) and torch.allclose(x.flatten(0, 1), y, atol=1e-4)
    assert source().graded_by == ""
    with pytest.raises(NotGraded, match="does not know how complex(.|\n)*ImageSource"): next(source().graded(5))

def test_a_store_of_image_tokens(source, tmp_path):
    s = source()
    store = ActivationStore.build(s, tmp_path/"store", n=200, shard_size=90, progress=False)
    assert torch.equal(torch.cat([store.shard(i) for i in range(len(store))]), next(s.stream(200))[0])
    with pytest.raises(ValueError, match="fingerprint.tokens: 'all' in the store, 'cls' wanted"): ActivationStore.build(source(tokens="cls"), tmp_path/"store", n=200, shard_size=90, progress=False)
    assert not StoreSource(store, source=s, **CPU).has_model

# ------------------------------------------------------------------ names and fingerprints

def test_the_default_is_embedded():
    s = make_source("scenes", device="cpu", seq_len=128, seed=3, layer=None, model=None, hook="post", dtype=None)
    assert isinstance(s, ImageSource) and s.name == "tiny-clip/scenes/blocks.3.post" and (s.d_in, s.n_tokens, s.grid) == (128, 65, (8, 8)) and s.has_text and not s.has_model
    assert make_source("digits", device="cpu", tokens="cls").name == "tiny-clip/digits/blocks.3.post/cls"

def test_other_pictures_for_the_same_model(source, photos):
    s = source(tokens="patches", layer=0)
    t = s.with_data(photos, templates="my {}")
    assert t.model is s.model and t.data.templates == ["my {}"] and t.name == "CLIP/photos/blocks.0.post/patches" and s.name == "CLIP/noise/blocks.0.post/patches" and s.data.name == "noise"
    assert t.with_data(s.data).fingerprint() == s.fingerprint() and t.graded_by == "" and s.with_data("counts").graded_by

def test_fingerprints(source, model):
    s = source()
    f = s.fingerprint()
    assert json.loads(json.dumps(f)) == f
    for field, other in dict(hook=source(layer=0), tokens=source(tokens="cls"), data=source(Noise(n=21)), preprocess=source(preprocess=lambda im: None)).items():
        assert [k for k in f if f[k] != other.fingerprint()[k]] == [field]
    assert [k for k in f if f[k] != source(hook="pre").fingerprint()[k]] == ["hook"]
    changed = {}
    for name in ("visual.conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight", "logit_scale"):
        m = clip()
        dict(m.named_parameters())[name].data.view(-1)[0] += 1
        changed[name] = clip_digest(m)
    changed.update(heads=clip_digest(clip(head_width=8)), same=clip_digest(clip()))
    quick = clip(); quick.visual.transformer.resblocks[0].mlp.gelu = open_clip.transformer.QuickGELU()
    changed["activation"] = clip_digest(quick)
    assert changed.pop("same") == clip_digest(model) and len({*changed.values(), clip_digest(model)}) == 6

# ------------------------------------------------------------------ loading

@pytest.fixture(scope="session")
def saved(tmp_path_factory, model):
    "The folder of a model as open_clip saves it."
    from safetensors.torch import save_file
    path = tmp_path_factory.mktemp("models")/"little-clip"
    path.mkdir()
    config = dict(model_cfg=dict(embed_dim=16, vision_cfg=SMALL, text_cfg=TEXT), preprocess_cfg=vars(PreprocessCfg(size=32)))
    (path/"open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path/"open_clip_model.safetensors")
    return path

@pytest.fixture
def listed(saved, tmp_path, monkeypatch):
    "The same model under the name ViT-little in open_clip's list, with weights of the tag `tag`."
    config = json.loads((saved/"open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-little", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-little", dict(tag=dict(hf_hub="org/little/", mean=(.1, .2, .3), quick_gelu=True)))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg, **o: str(saved/"open_clip_model.safetensors"))
    return "ViT-little"

def test_a_folder(saved, model, images):
    s = ImageSource(Noise(), model=str(saved), **CPU)
    loaded = ImageSource(Noise(), model=model, **CPU)
    assert s.name == "little-clip/noise/blocks.1.post" and torch.equal(s.embeddings(images), loaded.embeddings(images)) and s.weights_digest() == loaded.weights_digest()
    assert not s.model.training and torch.equal(s.prototypes(["fox"], ["a {}"]), loaded.prototypes(["fox"], ["a {}"]))
    assert ImageSource(Noise(), model=saved, pretrained=None, **CPU).fingerprint() == s.fingerprint()

def test_bad_folders(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json"): load_clip(tmp_path)
    with pytest.raises(ValueError, match="has its own weights; pretrained='openai'"): load_clip(saved, "openai")
    shutil.copy(saved/"open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match="could not load the model in .*weights"): load_clip(tmp_path)
    (tmp_path/"open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="could not load the model in"): load_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder ./nowhere"): load_clip("./nowhere")

def test_named_models(listed, saved, model, tmp_path):
    random = ImageSource(Noise(), model=listed, **CPU)
    assert random.model_name == "ViT-little:random" and random.weights_digest() == ImageSource(Noise(), model=listed, **CPU).weights_digest() and "random" in random.fingerprint()["model"]
    file = ImageSource(Noise(), model=listed, pretrained=saved/"open_clip_model.safetensors", **CPU)
    assert file.model_name == "ViT-little:open_clip_model" and file.weights_digest() == clip_digest(model) != random.weights_digest()
    with pytest.raises(ValueError, match="ViT-little has no pretrained weights 'tags'. Did you mean 'tag'. There is tag, or a local file"): load_clip(listed, "tags")
    with pytest.raises(FileNotFoundError, match="no file weights.pt"): load_clip(listed, "weights.pt")
    torch.save(dict(x=torch.ones(2)), tmp_path/"other.pt")
    with pytest.raises(ValueError, match="other.pt does not hold weights of ViT-little"): load_clip(listed, tmp_path/"other.pt")
    with pytest.raises(ValueError, match="this one is loaded"): ImageSource(Noise(), model=model, pretrained="tag", **CPU)

def test_the_activation_function_follows_the_weights(listed):
    "OpenAI's weights under the plain architecture would give wrong activations without a word."
    with pytest.MonkeyPatch.context() as m:
        m.setattr("warnings.warn", lambda *a, **k: pytest.fail(str(a)))
        tagged, key, name = load_clip(listed, "tag")
    assert name == "ViT-little:tag" and type(tagged.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert ImageSource(Noise(), model=listed, pretrained="tag", **CPU).config.mean == (.1, .2, .3)

def test_unknown_models():
    with pytest.raises(ValueError, match="unknown model 'ViT-B16'. Did you mean 'ViT-B-16'"): load_clip("ViT-B16")
    assert is_clip_name("ViT-B/16") and is_clip_name("hf-hub:org/name") and not is_clip_name("gpt2") and not is_clip_name(3)

def test_weights_that_are_not_to_be_had():
    with pytest.raises(OSError, match="could not get ViT-B-16 with the weights 'openai': tried the Hugging Face hub and this machine's cache(.|\n)*pretrained=<file>"): load_clip("ViT-B-16", "openai")
    with pytest.raises(OSError, match="could not get hf-hub:org/name(.|\n)*model=<folder>"): load_clip("hf-hub:org/name")

@pytest.mark.parametrize("name, message", [("ViT-B-16-SigLIP", "image tower from timm"), ("convnext_base", "image tower from timm")])
def test_towers_from_timm_are_refused_before_anything_is_loaded(name, message):
    with pytest.raises(ValueError, match=message): load_clip(name)

def test_a_resnet_is_refused():
    m = open_clip.CLIP(embed_dim=16, vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32), text_cfg=TEXT)
    with pytest.raises(ValueError, match="image tower of type ModifiedResNet.*VisionTransformer only"): ImageSource(Noise(), model=m, **CPU)
    with pytest.raises(ValueError, match="does not pool its tokens"): ImageSource(Noise(), model=clip(pool_type="none"), **CPU)

def test_loading_leaves_no_trace(saved, caplog):
    before, level = torch.get_rng_state(), logging.root.manager.disable
    load_clip(saved)
    assert torch.equal(before, torch.get_rng_state()) and logging.root.manager.disable == level and not caplog.records

@pytest.mark.slow
def test_vit_b_16_by_name():
    s = ImageSource("scenes", model="ViT-B/16", model_batch=2, **CPU)
    assert s.name == "ViT-B-16:random/scenes/blocks.10.post" and (s.d_in, s.n_tokens, s.grid) == (768, 197, (14, 14)) and s.has_text
    batch = s.data.load("test", [0])
    assert s.pixels(batch.images).shape == (1, 3, 224, 224) and torch.allclose(s.embeddings(batch.images), whole(s, batch.images), atol=1e-5)

# ------------------------------------------------------------------ prototypes

def test_prototypes_are_open_clips_zero_shot_classifier(source, model):
    s, classes, templates = source(), ["red fox", "owl"], ["a photo of a {}.", "many {}", "{}"]
    expected = open_clip.build_zero_shot_classifier(model, open_clip.SimpleTokenizer(context_length=16), classes, templates).T
    p = s.prototypes(classes, templates)
    assert torch.allclose(p, expected, atol=1e-6) and torch.allclose(p.norm(dim=1), torch.ones(2)) and not p.requires_grad
    assert torch.equal(s.prototypes(["{x} and {0}"], ["{}"]), s.prototypes(["{x} and {0}"], ["{}"]))

def test_prototype_mistakes(source, model):
    for bad in (("fox", ["{}"]), (["fox"], "{}"), ([], ["{}"]), (["fox"], [])):
        with pytest.raises(ValueError, match="lists of at least one string"): source().prototypes(*bad)
    tower = source(model=model.visual)
    assert not tower.has_text and tower.model_name == "VisionTransformer"
    with pytest.raises(ValueError, match="no text tower"): tower.prototypes(["fox"], ["{}"])

def test_a_tower_alone_gives_the_same_embeddings(source, model, images):
    assert torch.equal(source(model=model.visual).embeddings(images), source().embeddings(images))

def test_tokenizers(model):
    other = open_clip.CLIP(embed_dim=16, vision_cfg=SMALL, text_cfg=dict(TEXT, vocab_size=50))
    open_clip.set_model_preprocess_cfg(other, vars(PreprocessCfg(size=32)))
    with pytest.raises(ValueError, match="pass tokenizer="): ImageSource(Noise(), model=other, **CPU).prototypes(["a"], ["{}"])
    s = ImageSource(Noise(), model=other, tokenizer=lambda texts: torch.tensor([[len(t)] + [0]*15 for t in texts]), **CPU)
    assert s.prototypes(["a"], ["{}"]).shape == (1, 16)

# ------------------------------------------------------------------ which source is meant

def write(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path

def test_pictures_are_told_from_text(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")
    for i in range(5): (photos/f"caption{i}.txt").write_text("a fox")
    (tmp_path/"book").mkdir(); (tmp_path/"book"/"cover.png").write_bytes(b""); [(tmp_path/"book"/f"{i}.txt").write_text("text") for i in range(3)]
    rows = [dict(bytes=f.read_bytes(), path=None) for f in photos.rglob("*.png")]
    t = datasets.Dataset.from_dict(dict(image=rows), datasets.Features(image=datasets.Image(decode=False)))
    (tmp_path/"table").mkdir(); t.to_parquet(tmp_path/"table"/"train.parquet"); text = write(tmp_path/"text.parquet", text=["a"]*9)
    for dataset in ("scenes", "digits", "food101", "imagenet-1k", "ethz/food101", photos, str(photos), tmp_path/"table", tmp_path/"table"/"train.parquet", Noise()): assert find_source(dataset) is ImageSource, dataset
    for dataset in ("docs", tmp_path/"book", text, "org/name", ["a", "b"]): assert find_source(dataset) is TextSource, dataset
    assert find_source("org/name", "ViT-B-16") is find_source("org/name", data_dir("backbones", "tiny-clip")) is find_source("org/name", clip()) is ImageSource and find_source("org/name", "gpt2") is TextSource
    s = make_source(tmp_path/"table"/"train.parquet", **CPU)
    assert s.data.classes == [] and next(s.stream(10))[0].shape == (10, 128)

def test_options_go_to_the_pictures(photos, model):
    s = make_source(photos, model, 0, hook="pre", seq_len=64, seed=1, templates="a {}", classes={"owl": "barn owl"}, **CPU)
    assert s.data.templates == ["a {}"] and s.data.classes == ["barn owl", "red fox"] and s.layer == 0 and s.hook == "pre"
    with pytest.raises(TypeError, match="ImageSource has no option 'template'. Did you mean 'templates'"): make_source(photos, model, template="x")
    with pytest.raises(TypeError, match="Scenes has no option 'label_column'"): make_source("scenes", model, label_column="x")

@pytest.mark.parametrize("options, message", [(dict(layer=3), r"3 blocks, so layer is one of 0…2; got 3"), (dict(layer=-1), "got -1"), (dict(layer=True), "got True"), (dict(layer="last"), "got 'last'"),
    (dict(hook="posts"), "unknown hook 'posts'. Did you mean 'post'"), (dict(tokens="patch"), "unknown tokens 'patch'. Did you mean 'patches'"), (dict(dtype="float31"), "Did you mean 'float32'"),
    (dict(block_size=0), "block_size=0"), (dict(model_batch=1.5), "model_batch=1.5")])
def test_source_mistakes(source, options, message):
    with pytest.raises(ValueError, match=message): source(**options)

def test_an_empty_class_is_an_error(photos, model):
    (photos/"unicorn").mkdir()
    with pytest.raises(ValueError, match="class folder 'unicorn' .* holds no image"): make_source(photos, model, **CPU)

def test_a_run_on_scenes_can_be_configured():
    from sparsemax_sae.training.config import make_config
    from sparsemax_sae.training.trainer import run_source
    s = run_source(make_config("topk", preset="smoke", dataset="scenes", device="cpu", data_options=dict(block_size=8, tokens="cls")))
    assert isinstance(s, ImageSource) and next(s.stream(4))[0].shape == (4, 128)

# ------------------------------------------------------------------ real images, and a GPU

@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-10 beside the checkout")
def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")
    s = make_source(CIFAR, block_size=8, **CPU)
    assert s.name == "tiny-clip/cifar10/blocks.3.post" and next(s.stream(600))[0].isfinite().all()
    b, x = next(s.run("test", s.data.sample("test", 16)))
    assert torch.allclose(s.embeddings(b.images), whole(s, b.images), atol=1e-5) and x.shape == (16, 65, 128) and s.prototypes(s.data.classes, s.data.templates[:2]).shape == (10, 64)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda(saved, images, dtype):
    s = ImageSource(Noise(), model=saved, block_size=6, dtype=dtype, device="cuda")
    run = take(s.stream(50), 6)
    assert run[0][0].is_cuda and run[0][0].dtype == torch.float32 and torch.equal(next(s.stream(50, cursor=run[3][1]))[0], run[4][0])
    e = s.embeddings(images)
    assert e.is_cuda and torch.equal(e, s.embeddings(images, edit=lambda x: x.clone())) and s.prototypes(["a"], ["{}"]).is_cuda
    assert torch.allclose(e, whole(s, images), atol=1e-5) if dtype == "float32" else torch.allclose(e.norm(dim=1).cpu(), torch.ones(6))
