"The documentation corpus and the shipped language model: what their notebooks should not show."
import json, os, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sparsemax_sae.activations import corpus
from sparsemax_sae.activations.corpus import (SPLITS, corpus_fingerprint, corpus_records, corpus_table, deduplicate, docs_corpus, docstrings,
                                              extract_corpus, normalised, package_root, read_cache, source_files, topics, write_cache)
from sparsemax_sae.backbones.language_model import (EOS, baselines, evaluate_cross_entropy, generate, kneser_ney, pack, pair_counts, recipe, save_backbone,
                                                    spread, tiny_gpt2, train_language_model, train_tokenizer)
from sparsemax_sae.reproduce.paths import data_dir

SMALL = dict(train=("seaborn",), heldout=("nbformat",))

def paragraphs(texts): return {k for t in texts for p in t.split("\n\n") if len(k := normalised(p)) >= 60}

@pytest.fixture(scope="module")
def path(): return data_dir("backbones", "tiny-gpt2")

@pytest.fixture(scope="module")
def shipped(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True), AutoTokenizer.from_pretrained(path, local_files_only=True)

@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    "A cache of its own, and a corpus small enough to extract."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpus, "SPLITS", SMALL)
    monkeypatch.setattr(corpus, "extract_corpus", lambda: extract_corpus(SMALL))
    corpus._load.cache_clear()
    yield tmp_path
    corpus._load.cache_clear()

# the corpus

def test_splits_share_no_package_document_or_paragraph():
    packages = [p.split("/")[0] for s in SPLITS.values() for p in dict.fromkeys(q.split("/")[0] for q in s)]
    assert len(packages) == len(set(packages))
    texts = {s: docs_corpus(s) for s in SPLITS}
    everything = sum(texts.values(), [])
    assert len(everything) == len(set(everything))
    a, b, c = (paragraphs(t) for t in texts.values())
    assert not a & b and not a & c and not b & c

def test_sizes_and_order():
    assert sum(map(len, docs_corpus())) > 5e6
    keys = [(list(SPLITS).index(r["split"]), r["package"], r["module"]) for r in corpus_records()]
    assert keys == sorted(keys)
    table = corpus_table()
    assert table.characters.sum() == sum(len(r["text"]) for r in corpus_records())
    assert list(table.columns) == ["split", "package", "documents", "characters", "license"]

def test_extraction_is_deterministic_and_the_callers_list_is_a_copy():
    assert extract_corpus(SMALL) == extract_corpus(SMALL)
    mine, before = docs_corpus("heldout"), corpus_fingerprint("heldout")
    mine.clear()
    assert corpus_fingerprint("heldout") == before and docs_corpus("heldout")

@pytest.mark.slow
def test_cache_is_what_a_fresh_extraction_gives(): assert corpus_records() == extract_corpus()

def test_unknown_split_and_missing_packages(monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'validation'.*'heldout'"): docs_corpus("validation")
    assert package_root("no_such_package") is None and source_files("no_such_package") == []
    assert extract_corpus(dict(train=("no_such_package",))) == []
    monkeypatch.setattr(corpus, "corpus_records", lambda: [])
    with pytest.raises(LookupError, match="none of the packages of split 'heldout'"): docs_corpus("heldout")

def test_reading_imports_nothing(tmp_path, monkeypatch):
    (tmp_path/"explosive").mkdir()
    (tmp_path/"explosive"/"__init__.py").write_text('"""' + "A docstring of a package that must not be imported. "*3 + '"""\nraise RuntimeError("imported")\n')
    (tmp_path/"explosive"/"broken.py").write_text("def f(:\n")
    (tmp_path/"explosive"/"latin.py").write_bytes('"caf\xe9"'.encode("latin-1"))
    monkeypatch.syspath_prepend(str(tmp_path))
    record, = extract_corpus(dict(train=("explosive",)))
    assert record["module"] == "__init__.py" and "explosive" not in sys.modules

def test_attached_docstrings_and_topics():
    code = 'add_newdoc("m", "f",\n ("g", """\n    Line.\n    More.\n    """))\nother("x", """\n no\n""")'
    assert docstrings(code) == ["Line.\nMore."]
    assert topics('topics = {"a": "A", "b": "B"}') == ["A", "B"] and topics("x = 1") == []

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 3))
def test_deduplication_keeps_each_paragraph_once(numbers, size):
    text = lambda i: f"Paragraph number {i}: " + "long enough to be recognised wherever it appears again. "*2
    docs = ["\n\n".join(text(i) for i in numbers[j:j+size]) for j in range(0, len(numbers), size)]
    kept = [t for t in deduplicate(docs) if t]
    found = [normalised(p) for t in kept for p in t.split("\n\n")]
    assert sorted(found) == sorted({normalised(text(i)) for i in numbers})
    assert [t for t in deduplicate(kept) if t] == kept  # nothing more to drop

def test_deduplication_ignores_layout_and_continues_from_seen():
    text = "A sentence that is long enough to be taken for a copy wherever it is met a second time. "*2
    seen = set()
    assert list(deduplicate([text], seen)) == [text.rstrip()]
    assert list(deduplicate([text.replace(" ", "\n")], seen)) == [None]

@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not json", "a list", "folder"])
def test_a_damaged_cache_is_rebuilt(private_cache, damage):
    good = corpus.corpus_records()
    file = corpus.cache_path()
    assert file.is_file() and private_cache in file.parents and read_cache(file) == good
    raw = file.read_bytes()
    file.unlink()
    if damage == "folder": file.mkdir()
    else: file.write_bytes({"truncated": raw[:-50], "flipped": raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:], "empty": b"",
                            "not json": b"\x00\xff\n\n", "a list": b"[1]\n"}[damage])
    assert read_cache(file) is None
    corpus._load.cache_clear()
    assert corpus.corpus_records() == good
    if damage != "folder": assert read_cache(file) == good
    assert damage == "folder" or [f.name for f in file.parent.iterdir()] == [file.name]  # nothing half-written stays behind

def test_works_where_nothing_can_be_written(private_cache, monkeypatch):
    (private_cache/"file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(private_cache/"file"))
    assert {r["split"] for r in corpus.corpus_records()} == {"train", "heldout"}
    assert write_cache(private_cache/"file"/"x.jsonl", []) is False

def test_another_version_is_another_cache(private_cache, monkeypatch):
    here = corpus.cache_path()
    monkeypatch.setattr(corpus, "package_version", lambda p: "0.0")
    assert corpus.cache_path() != here

# the yardsticks

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 30))
def test_kneser_ney_is_a_distribution(seed, vocab):
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(np.minimum(rng.geometric(.2, (4, 20)) - 1, vocab - 1))
    counts = pair_counts(tokens, vocab)
    for v in range(vocab):
        p = kneser_ney(counts, np.full(vocab, v), np.arange(vocab))
        assert p.sum() == pytest.approx(1) and (p > 0).all()

def test_baselines_by_hand():
    uniform = torch.arange(8).repeat(50, 1)  # 0 1 2 ... 7 in every row: the pair table knows everything, the unigram nothing
    got = baselines(uniform, uniform, 8)
    assert got["uniform"] == pytest.approx(np.log(8)) and got["unigram"] == pytest.approx(np.log(8)) and got["bigram"] < .02

def test_packing_loses_nothing_but_the_tail():
    words = train_tokenizer(["a b c d e f"]*3, vocab_size=270)
    texts = ["a b", "c", "", "d e f"]
    stream = [i for t in texts for i in (words.eos_token_id, *words(t).input_ids)]
    rows = pack(texts, words, 3)
    assert rows.flatten().tolist() == stream[:len(stream)//3*3]
    with pytest.raises(ValueError, match="no row of seq_len=1000"): pack(texts, words, 1000)
    with pytest.raises(ValueError, match="at least 257"): train_tokenizer(texts, vocab_size=256)

def test_spread_and_recipe():
    rows = torch.arange(10)
    assert spread(rows, None) is rows and spread(rows, 99) is rows and spread(rows, 2).tolist() == [0, 9]
    a, b = recipe("smoke", steps=3, seed=5), recipe("smoke")
    assert a["training"]["steps"] == 3 and a["training"]["seed"] == a["model"]["seed"] == 5 and b["training"]["steps"] != 3
    with pytest.raises(ValueError, match="'smoke', 'full'"): recipe("paper")

def test_training_is_determined_by_the_seed_and_leaves_the_global_generator_alone(tmp_path):
    words = train_tokenizer(docs_corpus("heldout")[:50], vocab_size=300)
    rows = pack(docs_corpus("heldout")[:50], words, 16)
    def run(seed):
        model = tiny_gpt2(words, n_layer=1, n_embd=16, n_head=2, n_positions=16, seed=seed)
        return model, train_language_model(model, rows, 8, batch_size=4, seed=seed)
    state = torch.random.get_rng_state()
    (m, a), (_, b), (_, c) = run(0), run(0), run(1)
    assert a == b != c and not m.training
    assert torch.equal(state, torch.random.get_rng_state())
    calls = []
    train_language_model(m, rows, 3, callback=lambda step, loss: calls.append(step))
    assert calls == [1, 2, 3]
    save_backbone(tmp_path/"a"/"b", m, words, dict(x=1))
    assert json.loads((tmp_path/"a"/"b"/"training.json").read_text()) == dict(x=1)

# the shipped model

def test_loads_offline_by_the_auto_classes(path):
    code = ("import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1]);"
            "print(m.config.model_type, m.config.n_layer, m.config.n_embd, len(t), t.eos_token, m(torch.tensor([t('The mean').input_ids])).logits.shape[-1])")
    env = os.environ | dict(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["gpt2", "4", "128", "4096", EOS, "4096"]

def test_folder_is_small_and_plain(path):
    files = {f.name: f for f in path.rglob("*")}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert sum(f.stat().st_size for f in files.values()) < 8_000_000
    assert not any(f.read_bytes()[:2] in (b"PK", b"\x80\x04", b"\x80\x02") for f in files.values())
    for name in files.keys() - {"model.safetensors", "tokenizer.json"}:
        text = files[name].read_text(encoding="utf-8")
        json.loads(text)
        assert not any(mark in text for mark in ("/home", "/root", "/tmp", "/work", "/Users", "\\\\")), name

def test_weights_are_tied_float32_and_finite(shipped):
    model, _ = shipped
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())

@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=80))
def test_tokenizer_round_trips_any_text(shipped, text):
    words = shipped[1]
    assert words.decode(words(text).input_ids) == text

def test_tokenizer_adds_nothing_and_knows_the_end(shipped):
    words = shipped[1]
    assert words("a").input_ids == words("a", add_special_tokens=False).input_ids
    assert words.eos_token == words.bos_token == EOS and words(EOS).input_ids == [0] and words.model_max_length == 256

def test_beats_the_pair_table(shipped):
    model, words = shipped
    train = pack(docs_corpus("train"), words, 256)
    for split in ("heldout", "reference"):
        rows = spread(pack(docs_corpus(split), words, 256), 24)
        assert evaluate_cross_entropy(model, rows) < baselines(train, rows, len(words))["bigram"] - .6, split

def test_uses_its_whole_context(shipped):
    model, words = shipped
    rows = spread(pack(docs_corpus("heldout"), words, 256), 24)
    late = rows[:, 128:]  # the same tokens, with 128 tokens before them and without
    from sparsemax_sae.backbones.language_model import next_token_loss
    with torch.no_grad(): with_context = next_token_loss(model, rows, "none").view(24, 255)[:, 129:].mean().item()
    with torch.no_grad(): without = next_token_loss(model, late, "none").view(24, 127)[:, 1:].mean().item()
    assert with_context < without

def test_record_is_complete(path, shipped):
    record = json.loads((path/"training.json").read_text())
    assert {"recipe", "corpus", "tokens", "cross_entropy", "loss", "versions"} <= record.keys()
    assert set(record["corpus"]) == set(SPLITS) and record["recipe"]["training"].keys() >= {"steps", "batch_size", "lr", "seed"}
    for split in ("heldout", "reference"):
        ce = record["cross_entropy"][split]
        assert ce["model"] < ce["bigram"] - .6 < ce["bigram"] < ce["unigram"] < ce["uniform"]
    assert record["loss"][-1] < record["loss"][0] - 3

def test_generation_is_reproducible_and_bounded(shipped):
    a = generate(*shipped, "Return the number of", 20, top_k=10, seed=3)
    assert a == generate(*shipped, "Return the number of", 20, top_k=10, seed=3) and a.startswith("Return the number of")
    with pytest.raises(ValueError, match="leaves room for"): generate(*shipped, "a", 256)
