"""Pictures: what decodes and what is left out, folders, tables and the hub, class names, splits, and what is said about mistakes."""
import io, json, shutil, warnings
import datasets, numpy as np, pytest, torch
from PIL import Image
from sparsemax_sae.activations import pictures as module
from sparsemax_sae.activations.pictures import HUB, NAMES, SPLITS, StoredPictures, decode_image, hub_entry, image_columns, middle_rows, open_pictures, readable, split_of, tenths, to_rgb
from sparsemax_sae.reproduce.paths import root

pytestmark = pytest.mark.usefixtures("one_thread")
CIFAR = root().parent/"shared"/"data"/"cifar10"

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "No table is copied to the user's cache, and no bar is drawn."
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")

# ------------------------------------------------------------------ a few images

def picture(i, size=(12, 9)):
    "An image that is known by its colour: i in the red channel."
    return Image.new("RGB", size, (i, 255 - i, 7))

def encode(im, format="PNG", **options):
    out = io.BytesIO(); im.save(out, format, **options)
    return out.getvalue()

def number(im): return im.getpixel((3, 3))[0]

def fill(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers: picture(i).save(folder/f"{i:03}.png")

@pytest.fixture
def pets(tmp_path):
    "Three classes of 30, 12 and 3 images."
    for name, numbers in dict(house_cat=range(30), dog=range(30, 42), ferret=range(42, 45)).items(): fill(tmp_path/"pets"/name, numbers)
    return tmp_path/"pets"

def table(numbers, labels=None, names=None, **columns):
    features = dict(image=datasets.Image(decode=False))
    rows = dict(image=[dict(bytes=encode(picture(i)), path=None) for i in numbers])
    if labels is not None: rows["label"], features["label"] = list(labels), datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    for k, v in columns.items(): rows[k], features[k] = list(v), datasets.ClassLabel(names=sorted(set(map(str, v)))) if k.startswith("kind") else datasets.Value("string")
    return datasets.Dataset.from_dict(rows, datasets.Features(features))

def everything(data):
    "Split → (number, class) of all its images."
    found = {}
    for k, n in data.sizes.items():
        b = data.load(k, range(n))
        assert torch.equal(b.indices, torch.arange(n)) and b.complexity is None
        found[k] = [(number(im), data.classes[y] if y >= 0 else None) for im, y in zip(b.images, b.labels)]
    return found

# ------------------------------------------------------------------ decoding

GREY = np.linspace(0, 255, 40, dtype=np.uint8)[None].repeat(10, 0)

@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "1", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(GREY)
    im = {"I;16": lambda: Image.fromarray(GREY.astype(np.uint16)*257), "I": lambda: Image.fromarray(GREY.astype(np.int32)*257), "F": lambda: Image.fromarray(GREY.astype(np.float32)/255),
          "PA": lambda: grey.convert("P").convert("PA"), "CMYK": lambda: grey.convert("RGB").convert("CMYK"), "YCbCr": lambda: grey.convert("RGB").convert("YCbCr"),
          "HSV": lambda: grey.convert("RGB").convert("HSV")}.get(mode, lambda: grey.convert(mode))()
    assert im.mode == mode
    rgb = to_rgb(im)
    assert rgb.mode == "RGB" and rgb.size == (40, 10)
    if mode != "1": assert np.abs(np.asarray(rgb).astype(int) - GREY[..., None]).max() <= 3

@pytest.mark.parametrize("format, im", [("PNG", Image.fromarray(GREY.astype(np.uint16)*257)), ("TIFF", Image.fromarray(GREY.astype(np.uint16)*257)), ("TIFF", Image.fromarray(GREY).convert("CMYK")),
    ("JPEG", Image.fromarray(GREY).convert("RGB").convert("CMYK")), ("GIF", Image.fromarray(GREY).convert("P")), ("WEBP", Image.fromarray(GREY).convert("RGBA")), ("PPM", Image.fromarray(GREY))])
def test_every_format_is_read(format, im):
    rgb = decode_image(encode(im, format))
    assert rgb.mode == "RGB" and np.abs(np.asarray(rgb).astype(int) - GREY[..., None]).max() <= 12

def test_a_16_bit_ramp_is_scaled_and_an_8_bit_one_in_a_wide_mode_is_kept():
    assert to_rgb(Image.fromarray(np.array([[0, 257*10, 65535]], dtype=np.uint16))).tobytes() == bytes([0]*3 + [10]*3 + [255]*3)
    assert to_rgb(Image.fromarray(np.array([[0, 10, 255]], dtype=np.int32))).tobytes() == bytes([0]*3 + [10]*3 + [255]*3)

def test_a_turned_photograph_is_upright():
    exif = Image.Exif(); exif[0x0112] = 6
    assert decode_image(encode(picture(9), "JPEG", exif=exif)).size == (9, 12)

@pytest.mark.parametrize("data", ids=range(5), argvalues=[None, b"", b"not an image", encode(picture(3))[:50], encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900]])
def test_what_cannot_be_decoded_to_its_end_is_none(data): assert decode_image(data) is None

# ------------------------------------------------------------------ folders

def test_class_folders(pets):
    data = open_pictures(pets)
    assert isinstance(data, StoredPictures) and data.name == "pets" and data.classes == ["dog", "ferret", "house cat"] and data.parts == ["pets"] and len(data.templates) == 80
    found = everything(data)
    assert sorted(o for rows in found.values() for o in rows) == sorted([(i, "house cat") for i in range(30)] + [(i, "dog") for i in range(30, 42)] + [(i, "ferret") for i in range(42, 45)])
    assert {k: len(set(c for _, c in v)) for k, v in found.items()} == dict(train=3, count=3, test=3)
    assert data.sizes == dict(train=33, count=6, test=6)

def test_splits_do_not_depend_on_when_or_where(pets, tmp_path):
    first = everything(open_pictures(pets))
    shutil.copytree(pets, tmp_path/"elsewhere"/"pets")
    other = open_pictures(str(tmp_path/"elsewhere"/"pets"))
    assert everything(other) == first and other.fingerprint == open_pictures(pets).fingerprint

@pytest.mark.parametrize("test", ["test", "val", "Validation"])
def test_train_and_test_folders(tmp_path, test):
    for c, start in (("a", 0), ("b", 40)): fill(tmp_path/"d"/"train"/c, range(start, start + 20))
    fill(tmp_path/"d"/test/"b", range(90, 95))
    (tmp_path/"d"/"annotations").mkdir()
    data = open_pictures(tmp_path/"d")
    assert data.sizes == dict(train=36, count=4, test=5) and everything(data)["test"] == [(i, "b") for i in range(90, 95)]

def test_all_three_folders(tmp_path):
    for k, start in (("train", 0), ("val", 50), ("test", 100)): fill(tmp_path/"d"/k/"a", range(start, start + 10))
    assert [i for i, _ in everything(open_pictures(tmp_path/"d"))["test"]] == list(range(100, 110))
    assert [i for i, _ in everything(open_pictures(tmp_path/"d", test_split="validation"))["test"]] == list(range(50, 60))

def test_images_without_classes(tmp_path):
    fill(tmp_path/"d", range(20)); (tmp_path/"d"/"notes").mkdir()
    data = open_pictures(tmp_path/"d")
    assert data.classes == data.parts == [] and data.sizes == dict(train=16, count=2, test=2) and (data.load("train", [0, 1]).labels == -1).all()

def test_a_class_called_train(tmp_path):
    for c in ("bus", "train"): fill(tmp_path/"d"/c, range(10))
    assert open_pictures(tmp_path/"d").classes == ["bus", "train"]

def test_hidden_files_and_folders_are_no_images(pets):
    fill(pets/".cache", [200]); fill(pets/"__MACOSX", [201]); (pets/"dog"/".hidden.png").write_bytes(b"")
    assert sum(open_pictures(pets).sizes.values()) == 45

@pytest.mark.parametrize("make, message", [
    (lambda d: (d/"pets"/"unicorn").mkdir(), "the class folder 'unicorn' .* holds no image"), (lambda d: fill(d/"pets", [7]), "007.png.* beside folders of images"),
    (lambda d: [shutil.rmtree(d/"pets"/n) for n in ("dog", "house_cat")] and (d/"pets"/"ferret"/"042.png").unlink(), "too few images.*'train'"),
    (lambda d: [shutil.rmtree(d/"pets"/n) for n in ("dog", "house_cat", "ferret")], "holds no image: expected .png")])
def test_bad_folders(pets, tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message): open_pictures(pets)

def test_a_test_class_that_was_never_trained_on(tmp_path):
    fill(tmp_path/"d"/"train"/"red_fox", range(10)); fill(tmp_path/"d"/"test"/"red fix", range(5))
    with pytest.raises(ValueError, match="class 'red fix' .* Did you mean 'red fox'"): open_pictures(tmp_path/"d")

def test_nothing_is_decoded_before_it_is_asked_for(pets, monkeypatch):
    asked, real = [], module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda data: asked.append(1) or real(data))
    data = open_pictures(pets)
    assert not asked
    data.load("train", [3, 1]); assert len(asked) == 2

# ------------------------------------------------------------------ corrupt images

def test_corrupt_images_are_left_out_and_counted_once(pets):
    whole = open_pictures(pets)
    at = {k: whole.load(k, range(n)) for k, n in whole.sizes.items()}
    for i in (0, 31): f = next(pets.rglob(f"{i:03}.png")); f.write_bytes(f.read_bytes()[:50])
    data = open_pictures(pets)
    bad = {(k, j) for k, b in at.items() for j, im in enumerate(b.images) if number(im) in (0, 31)}
    assert data.skipped == 0
    with pytest.warns(UserWarning, match=r"pets: (house_cat|dog)/0\d\d.png cannot be decoded") as seen:
        for _ in range(2):
            for k, n in data.sizes.items():
                b = data.load(k, range(n))
                assert b.indices.tolist() == [i for i in range(n) if (k, i) not in bad] and len(b) == len(b.images) == len(b.labels)
                assert [number(im) for im in b.images] == [number(at[k].images[i]) for i in b.indices] and torch.equal(b.labels, at[k].labels[b.indices])
    assert len(seen) == 1 and data.skipped == 2
    k, i = sorted(bad)[0]
    with pytest.raises(ValueError, match=f"image {i} of split '{k}' of pets is corrupt"): data.image(k, i)

def test_a_missing_file_is_no_corrupt_image(pets):
    data = open_pictures(pets)
    shutil.rmtree(pets/"dog")
    with pytest.raises(FileNotFoundError): data.load("train", range(data.sizes["train"]))

def test_order_repetition_and_emptiness(pets):
    data = open_pictures(pets)
    b = data.load("train", [5, 2, 5])
    assert b.indices.tolist() == [5, 2, 5] and number(b.images[0]) == number(b.images[2]) == number(data.image("train", 5))
    assert len(data.load("test", [])) == 0 and len(data.load("test", torch.zeros(0, dtype=torch.long)).images) == 0
    with pytest.raises(IndexError): data.load("train", [33])
    with pytest.raises(ValueError, match="unknown split 'training'.*Did you mean 'train'"): data.load("training", [0])

def test_samples_are_nested_and_fixed(pets):
    data = open_pictures(pets)
    assert torch.equal(data.sample("train", 10), data.sample("train", 20)[:10]) and sorted(data.sample("train", 99).tolist()) == list(range(33))
    assert data.describe("train", [0]) is None

# ------------------------------------------------------------------ tables

@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path/"shop"
    folder.mkdir()
    table(range(24), [i % 2 for i in range(24)], ["red_hat", "shoe"]).to_parquet(folder/"train-00000-of-00002.parquet")
    table(range(24, 40), [i % 2 for i in range(24, 40)], ["red_hat", "shoe"]).to_parquet(folder/"train-00001-of-00002.parquet")
    table(range(40, 46), [1]*6, ["red_hat", "shoe"]).to_parquet(folder/"test-00000-of-00001.parquet")
    return folder

def test_parquet_folder(parquet):
    data = open_pictures(parquet)
    assert data.name == "shop" and data.classes == ["red hat", "shoe"] and data.sizes == dict(train=36, count=4, test=6)
    found = everything(data)
    assert found["test"] == [(i, "shoe") for i in range(40, 46)] and sorted(found["train"] + found["count"]) == [(i, data.classes[i % 2]) for i in range(40)]

def test_one_parquet_file(parquet):
    data = open_pictures(str(parquet/"train-00000-of-00002.parquet"))
    assert data.name == "train-00000-of-00002" and data.sizes == dict(train=16, count=4, test=4)

def test_a_rewritten_file_is_read_again(parquet):
    f, before = parquet/"test-00000-of-00001.parquet", open_pictures(parquet)
    table(range(60, 66), [0]*6, ["red_hat", "shoe"]).to_parquet(f)
    after = open_pictures(parquet)
    assert everything(after)["test"] == [(i, "red hat") for i in range(60, 66)] and after.fingerprint != before.fingerprint

def test_split_folders_of_parquet(tmp_path):
    for k, numbers in (("train", range(10)), ("validation", range(20, 25))): (tmp_path/"d"/k).mkdir(parents=True); table(numbers).to_parquet(tmp_path/"d"/k/"0000.parquet")
    data = open_pictures(tmp_path/"d")
    assert data.classes == [] and data.sizes == dict(train=9, count=1, test=5)

def test_parquet_without_metadata(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    bytes_ = [encode(picture(i)) for i in range(12)]
    pq.write_table(pa.table(dict(img=bytes_, label=["b c", "a"]*6)), tmp_path/"plain.parquet")
    pq.write_table(pa.table(dict(photo=[dict(bytes=b, path="x.png") for b in bytes_], label=[3, 0]*6)), tmp_path/"struct.parquet")
    plain, struct = open_pictures(tmp_path/"plain.parquet"), open_pictures(tmp_path/"struct.parquet")
    assert plain.classes == ["a", "b c"] and sorted(sum(everything(plain).values(), [])) == [(i, ["b c", "a"][i % 2]) for i in range(12)]
    assert struct.classes == ["0", "1", "2", "3"] and sorted(sum(everything(struct).values(), [])) == [(i, ["3", "0"][i % 2]) for i in range(12)]

def test_missing_labels_and_missing_images(tmp_path):
    t = table(range(12), [None, 0, 1]*4, ["a", "b"])
    rows = t.to_dict(); rows["image"][1] = None
    datasets.Dataset.from_dict(rows, t.features).to_parquet(tmp_path/"d.parquet")
    data = open_pictures(tmp_path/"d.parquet")
    with pytest.warns(UserWarning, match="row 1 cannot be decoded"): loaded = [data.load(k, range(n)) for k, n in data.sizes.items()]
    labels = {number(im): int(y) for b in loaded for im, y in zip(b.images, b.labels)}
    assert labels == {i: i % 3 - 1 for i in range(12) if i != 1} and data.skipped == 1

def test_the_choice_of_columns(tmp_path):
    t = table(range(10), kind_of_hat=["a", "b"]*5, kind_of_shoe=["c", "d"]*5)
    t = t.add_column("mask", t["image"][:]).cast_column("mask", datasets.Image(decode=False))
    t.to_parquet(tmp_path/"d.parquet")
    with pytest.raises(ValueError, match="it could be kind_of_hat or kind_of_shoe. Choose one with label_column="): open_pictures(tmp_path/"d.parquet")
    with pytest.raises(ValueError, match="no column 'maks'. Did you mean 'mask'"): open_pictures(tmp_path/"d.parquet", image_column="maks")
    assert open_pictures(tmp_path/"d.parquet", label_column="kind_of_shoe", image_column="mask").classes == ["c", "d"]
    with pytest.raises(ValueError, match="holds dict; labels are"): open_pictures(tmp_path/"d.parquet", label_column="image")

def test_images_are_known_from_text(tmp_path, parquet):
    import pyarrow.parquet as pq
    datasets.Dataset.from_dict(dict(text=["a"]*10)).to_parquet(tmp_path/"text.parquet")
    assert image_columns(pq.read_schema(tmp_path/"text.parquet")) == [] and image_columns(pq.read_schema(next(parquet.iterdir()))) == ["image"]
    assert StoredPictures.accepts(tmp_path/"text.parquet") == 1 and StoredPictures.accepts(parquet) == 2
    with pytest.raises(ValueError, match="holds no images"): open_pictures(tmp_path/"text.parquet")
    with pytest.raises(ValueError, match="holds no images"): open_pictures("food101", local=tmp_path/"text.parquet")

def test_saved_to_disk(tmp_path):
    datasets.DatasetDict(train=table(range(20), [0]*20, ["a"]), test=table(range(30, 34), [0]*4, ["a"])).save_to_disk(tmp_path/"dict")
    table(range(10)).save_to_disk(tmp_path/"one")
    assert open_pictures(tmp_path/"dict").sizes == dict(train=18, count=2, test=4) and open_pictures(tmp_path/"one").sizes == dict(train=8, count=1, test=1)

def test_names_speak_of_splits():
    assert [split_of(n) for n in ("train-00000-of-00002", "data/VAL_1", "cifar10_test", "2012", "trainer", "validation/0000")] == ["train", "val", "test", None, None, "val"]
    assert middle_rows("abababbb") == [2, 5] and readable("__red__fox_") == "red fox"

# ------------------------------------------------------------------ the hub

@pytest.fixture
def hub(monkeypatch):
    "A hub that answers with `hub.sets[path]` and records what it is asked for."
    class Hub: sets, asked = {}, []
    def load(path, name=None, split=None):
        Hub.asked.append((path, name, split))
        if path not in Hub.sets: raise ConnectionError("no such thing")
        return [Hub.sets[path][s] for s in split] if split else datasets.DatasetDict(Hub.sets[path])
    monkeypatch.setattr(datasets, "load_dataset", load)
    Hub.asked.clear(); Hub.sets.clear()
    return Hub

def test_a_data_set_of_the_paper(hub):
    hub.sets["ethz/food101"] = dict(train=table(range(20), [i % 2 for i in range(20)], ["apple_pie", "pho"]), validation=table(range(50, 55), [1]*5, ["apple_pie", "pho"]))
    for name in ("food101", "ethz/food101"):
        data = open_pictures(name, templates="own")
        assert data.name == "food101" and data.classes == ["apple pie", "pho"] and data.sizes == dict(train=18, count=2, test=5) and data.templates == ["a photo of {}, a type of food."]
    assert len(open_pictures("food101").templates) == 80

def test_imagenet_is_given_its_words_and_its_secret_labels_are_not_asked_for(hub):
    from open_clip import IMAGENET_CLASSNAMES
    names = [f"n{i:08}" for i in range(1000)]
    hub.sets["ILSVRC/imagenet-1k"] = dict(train=table(range(12), [7]*12, names), validation=table(range(20, 24), [999]*4, names))
    data = open_pictures("imagenet-1k")
    assert hub.asked == [("ILSVRC/imagenet-1k", None, ["train", "validation"])] and data.classes == list(IMAGENET_CLASSNAMES) and everything(data)["test"][0][1] == IMAGENET_CLASSNAMES[999]
    hub.sets["ILSVRC/imagenet-1k"] = {k: table(range(12), [0]*12, ["n1", "n2"]) for k in ("train", "validation")}
    with pytest.raises(ValueError, match="classes are 1000 names, but there are 2 classes"): open_pictures("imagenet-1k")
    assert open_pictures("imagenet-1k", classes=["tench", "shark"]).classes == ["tench", "shark"]

def test_caltech_loses_its_background(hub):
    names = ["accordion", "airplanes", "background_google", "car_side", "faces", "faces_easy"]
    hub.sets["dpdl-benchmark/caltech101"] = dict(train=table(range(60), [i % 6 for i in range(60)], names), test=table(range(60, 90), [i % 6 for i in range(30)], names))
    data = open_pictures("caltech101")
    assert data.classes == ["accordion", "airplane", "car side", "face"] and data.sizes == dict(train=36, count=4, test=20)
    found = everything(data)
    assert {c for _, c in found["test"]} == set(data.classes) and all(i % 6 not in (2, 5) for rows in found.values() for i, _ in rows)
    assert all(c == dict(zip([0, 1, 3, 4], data.classes))[i % 6] for rows in found.values() for i, c in rows)

def test_ucf_is_one_frame_per_clip(hub):
    t = lambda start: table(range(start, start + 30), [(i // 15) for i in range(30)], ["ApplyEyeMakeup", "YoYo"], clip_id=[f"{start}{i//3}" for i in range(30)])
    hub.sets["flwrlabs/ucf101"] = dict(train=t(0), test=t(100))
    data = open_pictures("ucf101")
    assert data.classes == ["Apply Eye Makeup", "Yo Yo"] and [i for i, _ in everything(data)["test"]] == list(range(101, 130, 3)) and sum(data.sizes.values()) == 20

def test_aircraft_are_told_apart_by_variant(hub):
    t = lambda: table(range(20), [0]*20, ["Boeing"], kind_v=["1", "2"]*10).rename_column("kind_v", "variation")
    hub.sets["Donghyun99/FGVC-Aircraft"] = dict(train=t(), val=t(), test=t())
    assert open_pictures("fgvc_aircraft").classes == ["1", "2"]

def test_a_test_split_without_labels_gives_way(hub):
    names = ["a", "b"]
    hub.sets["org/name"] = dict(train=table(range(10), [0, 1]*5, names), test=table(range(20, 25), [-1]*5, names), validation=table(range(30, 34), [0, 1]*2, names))
    data = open_pictures("org/name", config="small")
    assert [i for i, _ in everything(data)["test"]] == [30, 31, 32, 33] and data.name == "name" and hub.asked == [("org/name", "small", None)]
    del hub.sets["org/name"]["validation"]
    with pytest.raises(ValueError, match="no image of the test split test has a label"): open_pictures("org/name")

def test_hub_mistakes(hub):
    hub.sets["org/name"] = {"2012": table(range(5)), "2013": table(range(5))}
    with pytest.raises(ValueError, match="which split is to train on"): open_pictures("org/name")
    with pytest.raises(ValueError, match="no split '2014'. Did you mean '201"): open_pictures("org/name", train_split="2014")
    with pytest.raises(ValueError, match="both '2012'"): open_pictures("org/name", train_split="2012", test_split="2012")
    assert open_pictures("org/name", train_split="2012", test_split="2013").sizes["test"] == 5
    with pytest.raises(OSError, match="could not read 'org/other' from the Hugging Face hub(.|\n)*local=<path>(.|\n)*no such thing"): open_pictures("org/other")

def test_a_local_copy_of_a_hub_data_set(tmp_path, parquet):
    for c in ("apple_pie", "pho"): fill(tmp_path/"copy"/"train"/c, range(20)); fill(tmp_path/"copy"/"val"/c, range(5))
    data = open_pictures("food101", local=tmp_path/"copy", templates="own")
    assert data.name == "food101" and data.sizes == dict(train=36, count=4, test=10) and data.templates[0].endswith("food.")
    assert open_pictures("dtd", local=parquet).classes == ["red hat", "shoe"]
    with pytest.raises(FileNotFoundError, match="no file or folder"): open_pictures("dtd", local="./nowhere")

def test_the_eleven():
    assert len(HUB) == 11 and set(HUB) <= set(NAMES) and all(hub_entry(v["path"])["name"] == k and v["own"].count("{}") == 1 for k, v in HUB.items())

# ------------------------------------------------------------------ names, prompts, fingerprints

def test_classes_and_templates(pets):
    assert open_pictures(pets, classes={"dog": "puppy"}).classes == ["puppy", "ferret", "house cat"] and open_pictures(pets, classes=list("xyz")).classes == list("xyz")
    with pytest.raises(ValueError, match="no class. Did you mean 'dog'"): open_pictures(pets, classes={"dogs": "puppy"})
    with pytest.raises(ValueError, match="are 2 names, but there are 3 classes"): open_pictures(pets, classes=["a", "b"])
    assert open_pictures(pets, templates="my {}").templates == ["my {}"] and open_pictures(pets, templates=["a {}", "the {}"]).templates == ["a {}", "the {}"]
    with pytest.raises(ValueError, match="only the data sets .*food101"): open_pictures(pets, templates="own")
    with pytest.raises(ValueError, match="one {} for the class name"): open_pictures(pets, templates=["a photo"])

def test_fingerprints(pets, tmp_path):
    first = open_pictures(pets).fingerprint
    assert json.loads(json.dumps(first)) == first == open_pictures(pets, classes=list("xyz"), templates="my {}").fingerprint
    (pets/"dog"/"030.png").rename(pets/"ferret"/"030.png")
    moved = open_pictures(pets).fingerprint
    picture(77).save(pets/"ferret"/"030.png")
    painted = open_pictures(pets).fingerprint
    (pets/"ferret"/"030.png").unlink()
    assert len({json.dumps(f) for f in (first, moved, painted, open_pictures(pets).fingerprint)}) == 4

def test_tenths_are_even_and_reach_every_class():
    labels = torch.tensor([0]*37 + [1]*3 + [-1]*10)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    t = tenths(labels)
    assert torch.equal(t, tenths(labels)) and t[labels == 0].bincount(minlength=10).tolist() == [4]*7 + [3]*3
    assert sorted(t[labels == 1].tolist()) == [0, 1, 2] and sorted(t[labels == -1].tolist()) == list(range(10))

# ------------------------------------------------------------------ the registry

def test_unknown_pictures_and_options(pets, tmp_path):
    with pytest.raises(ValueError, match="unknown pictures 'food-101'. Did you mean 'food101'(.|\n)*scenes(.|\n)*a folder"): open_pictures("food-101")
    with pytest.raises(ValueError, match="unknown pictures"): open_pictures(3)
    with pytest.raises(TypeError, match="StoredPictures has no option 'label_colum'. Did you mean 'label_column'"): open_pictures(pets, label_colum="x")
    with pytest.raises(FileNotFoundError, match="no file or folder ./nowhere"): open_pictures("./nowhere")
    with pytest.raises(ValueError, match="holds no image"): (tmp_path/"empty").mkdir(); open_pictures(tmp_path/"empty")
    data = open_pictures(pets)
    assert open_pictures(data) is data
    with pytest.raises(TypeError, match="pets is open"): open_pictures(data, templates="own")

def test_scenes_are_pictures():
    scenes = open_pictures("scenes")
    assert set(SPLITS) == set(scenes.sizes) and not scenes.classes and all(open_pictures(p).classes for p in scenes.parts)
    b = scenes.load("test", [2, 0])
    assert b.images.dtype == torch.uint8 and b.indices.tolist() == [2, 0] and scenes.image("test", 2).size == tuple(b.images.shape[2:])
    with pytest.raises(TypeError, match="Scenes has no option 'templates'"): open_pictures("scenes", templates="own")

# ------------------------------------------------------------------ real images

@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-10 beside the checkout")
def test_cifar10():
    data = open_pictures(CIFAR)
    assert data.name == "cifar10" and data.classes == "airplane automobile bird cat deer dog frog horse ship truck".split() and data.sizes == dict(train=45_000, count=5_000, test=10_000)
    b = data.load("test", data.sample("test", 50))
    assert len(b) == 50 and all(im.size == (32, 32) and im.mode == "RGB" for im in b.images) and data.skipped == 0 and len(b.labels.unique()) > 5
    assert (data.splits["count"][2].bincount() == 500).all()
