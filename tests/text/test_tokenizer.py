import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gspn_jax.text import Tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "text_to_image"
FOLDER, FOLDER_2 = (GOLDEN / "sdxl_folder" / name for name in ("tokenizer", "tokenizer_2"))
START, END = 832, 833

# The merges of the published vocabulary that three texts take, by the id of what they give: 512 and the rank.
MERGES = {
    531: "t o</w>", 535: "i c", 536: "a t</w>", 539: "o f</w>", 561: "d e", 563: "v e</w>", 568: "' s</w>",
    585: "i t</w>", 590: "t s</w>", 606: "h o", 702: "a f", 748: "! !</w>", 816: "p ho", 901: "p ic", 995: "! !!</w>",
    1097: "n a", 1125: "pho to</w>", 2368: "c at</w>", 3471: "c af", 4166: "Ã ©</w>", 11307: "de pic",
    15304: "caf Ã©</w>", 29340: "depic ts</w>", 35689: "Ã ¯",
}  # fmt: skip


def copied(folder: pathlib.Path, target: pathlib.Path, **changes) -> pathlib.Path:
    """Copies a tokenizer; `changes` go into its config, and None leaves a key out."""
    shutil.copytree(folder, target)
    (target / "special_tokens_map.json").unlink()
    config = json.loads((target / "tokenizer_config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def row(*ids, padding=END, length=77):
    return np.array([[START, *ids, END, *[padding] * (length - 2 - len(ids))]])


@pytest.mark.parametrize("model,name,key", [
    ("sd15", "tokenizer", "ids"), ("sdxl", "tokenizer", "ids"), ("sdxl", "tokenizer_2", "ids_2")
])  # fmt: skip
def test_ids_of_the_published_program(model, name, key):
    with np.load(GOLDEN / f"pipeline_{model}.npz") as saved:
        texts, want = saved["texts"].tolist(), saved[key]
    tokenizer = Tokenizer.from_pretrained(GOLDEN / f"{model}_folder" / name)
    got = tokenizer(texts)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(tokenizer(texts[0]), want[:1])


@pytest.mark.parametrize("text,ids", [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("A photo depicts ", [320, 1125, 29340]),
    ("It's 2024: naïve café, 猫!!! ",
     [585, 568, 273, 271, 273, 275, 281, 1097, 35689, 563, 15304, 267, 163, 234, 360, 995]),
    ("", []),
])  # fmt: skip
def test_ids_of_the_published_vocabulary(tmp_path, text, ids):
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    vocabulary = {token: number for token, number in vocabulary.items() if number < 512}  # all bytes, in every file
    vocabulary |= {"".join(pair.split()): number for number, pair in MERGES.items()}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES.values(), ""]))
    got = Tokenizer.from_pretrained(tmp_path)(text)
    np.testing.assert_array_equal(got, [[49406, *ids, *[49407] * (76 - len(ids))]])


def test_special_tokens_in_a_text():
    first, second = (Tokenizer.from_pretrained(folder) for folder in (FOLDER, FOLDER_2))
    # the letters' ids are those of "a</w>" and "b</w>", the sign's that of "!</w>"
    np.testing.assert_array_equal(first("a<|endoftext|>B !"), row(320, END, 321, 256))
    np.testing.assert_array_equal(first("<|startoftext|> <|EndOfText|>"), row(START, END))
    np.testing.assert_array_equal(second("a! b"), row(320, 0, 321, padding=0))


def test_tokenizer_json_gives_the_same_ids(tmp_path):
    """Such a file may ask for truncation and padding of its own, and does not say with what the model pads."""
    folder = copied(FOLDER_2, tmp_path / "tokenizer")
    texts = ["a red cat!", "word " * 100, ""]
    plain = Tokenizer.from_pretrained(folder)
    want, cut = plain(texts), plain.cut(texts[1])
    encoder = plain._encoder
    encoder.enable_truncation(5)
    encoder.enable_padding(length=9)
    encoder.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    other = Tokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(other(texts), want)
    assert other.cut(texts[1]) == cut != ""


def test_length_and_padding_of_a_config(tmp_path):
    short = Tokenizer.from_pretrained(copied(FOLDER, tmp_path / "short", model_max_length=5, pad_token="<|endoftext|>"))
    np.testing.assert_array_equal(short(["a", "a a a a a"]), [[START, 320, END, END, END], [START, 320, 320, 320, END]])
    absent = copied(FOLDER_2, tmp_path / "absent", model_max_length=None, pad_token=None, bos_token="<|startoftext|>")
    np.testing.assert_array_equal(Tokenizer.from_pretrained(absent)("a!"), row(320, 256))
    (absent / "tokenizer_config.json").unlink()
    np.testing.assert_array_equal(Tokenizer.from_pretrained(absent)("a"), row(320))
    no_limit = copied(FOLDER, tmp_path / "no_limit", model_max_length=10**30)
    assert Tokenizer.from_pretrained(no_limit).length == 77


def test_added_tokens(tmp_path):
    end = {"content": "<|endoftext|>", "normalized": True, "special": True}
    new = {"content": "<my-cat>", "normalized": False, "special": False}
    folder = copied(FOLDER, tmp_path / "added", added_tokens_decoder={"834": new, "833": end})
    np.testing.assert_array_equal(Tokenizer.from_pretrained(folder)("a <my-cat>"), row(320, 834))
    folder = copied(FOLDER, tmp_path / "wrong", added_tokens_decoder={"900": new})
    with pytest.raises(
        ValueError, match="folder: expected the ids of added_tokens_decoder .*, got '<my-cat>' with id 834"
    ):
        Tokenizer.from_pretrained(folder)


def test_what_is_cut():
    tokenizer = Tokenizer.from_pretrained(FOLDER)
    words = " ".join(["cat"] * 37)  # 37 pairs of tokens
    assert tokenizer(words)[0, -2] == END
    assert tokenizer.cut(words) == tokenizer.cut(words + " A") == tokenizer.cut("") == ""
    assert tokenizer.cut(words + " A  Café,  twice") == "Café,  twice"
    np.testing.assert_array_equal(tokenizer(words + " A  Café,  twice"), tokenizer(words + " a"))


def test_bad_input_is_refused(tmp_path):
    def refuses(words, folder):
        with pytest.raises(ValueError, match=words):
            Tokenizer.from_pretrained(folder)

    tokenizer = Tokenizer.from_pretrained(FOLDER)
    wrong: list[Any] = [["a", None], [3], [b"a"]]
    for texts in wrong:
        with pytest.raises(ValueError, match="texts: expected a string or strings, got "):
            tokenizer(texts)
    refuses("folder: expected tokenizer.json, or vocab.json and merges.txt, in .*, got neither", tmp_path)
    refuses(
        "expected a pad_token of the vocabulary in .*, got '<pad>'", copied(FOLDER, tmp_path / "a", pad_token="<pad>")
    )
    refuses("expected a bos_token of the vocabulary in .*, got 3", copied(FOLDER, tmp_path / "b", bos_token=3))
    for number, length in enumerate((1, "77", 76.5)):
        folder = copied(FOLDER, tmp_path / f"length{number}", model_max_length=length)
        refuses("expected a model_max_length of at least 2", folder)
    for number, (name, content) in enumerate([
        ("merges.txt", "one two three"), ("merges.txt", "no such\npair here"),
        ("vocab.json", "{"), ("vocab.json", "[]"), ("tokenizer.json", "{}"),
    ]):  # fmt: skip
        folder = copied(FOLDER, tmp_path / f"damaged{number}")
        (folder / name).write_text(content)
        refuses("folder: expected the files of a tokenizer in .*, got damaged ones", folder)
    for number, (content, words) in enumerate(
        [("{", "expected JSON in"), ("[]", "expected a mapping in .*, got list")]
    ):
        folder = copied(FOLDER, tmp_path / f"config{number}")
        (folder / "tokenizer_config.json").write_text(content)
        refuses(words, folder)


def test_the_library_is_imported_late():
    program = "import sys, gspn_jax.text; sys.exit('tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
