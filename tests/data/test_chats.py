"""Chats rendered by a tokenizer's chat template: the ids of transformers, and no special token out of a message."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.many_tokenizers import TOKENIZERS, save
from tests.data.test_going_on import go_on, stream_of, tokens
from xlstm_lm.data import (
    DataConfig,
    DocumentData,
    SourceConfig,
    TokenizerConfig,
    TrainingStream,
    build_tokenizer,
    open_source,
)
from xlstm_lm.data.documents import documents
from xlstm_lm.data.tokenize_sources import tokenize

CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'tool' %}{{ message.content | tojson }}{% elif message.role == 'assistant' %}"
    " {{ message.content }}{{ eos_token }}{% else %}{{ raise_exception('no such role: ' + message.role) }}"
    "{% endif %}{% endfor %}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
CHAT = [{"role": "user", "content": "Is 12 < 34?\n"}, {"role": "assistant", "content": " yes, the ing\n\nab 日本 "}]
FRAGMENTS = [*SPECIAL, "<|e|>", "<", "<|im_", "<|", "start|>", "|>", ">", "s>", " ", "\n", "the", "é", "12", "[INST]"]
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool"]),
            "content": st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join),
        }
    ),
    min_size=1,
    max_size=4,
)


def saved(
    folder, kind: str, template: str | list[dict[str, str]], special: list[str] = SPECIAL, end: str = "<|e|>"
) -> TokenizerConfig:
    backend = TOKENIZERS[kind]()
    if end != "<|e|>":
        backend = type(backend).from_str(backend.to_str().replace("<|e|>", end))
    backend.add_special_tokens(special)
    return save(backend, folder, bos_token=special[0], eos_token=end, chat_template=template)


def by_transformers(config: TokenizerConfig, messages) -> list[int]:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(config.name)
    ids = loaded.apply_chat_template(messages, tokenize=True, return_dict=False)
    return ids[:-1] if ids[-1] == loaded.eos_token_id else ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_ids_are_those_of_transformers(kind, template, tmp_path):
    config = saved(tmp_path, kind, template)
    tokenizer = build_tokenizer(config)
    _, ids = tokenizer.chat.encode(json.dumps(CHAT))
    assert ids.tolist() == by_transformers(config, CHAT)
    assert pickle.loads(pickle.dumps(tokenizer)).chat.encode(json.dumps(CHAT))[1].tolist() == ids.tolist()


@pytest.fixture(scope="module", params=["gpt2", "llama3", "llama2", "t5"])
def named_twice(request, tmp_path_factory):
    """Two tokenizers that differ in the names of special tokens only, and a template for each."""
    other = ["«b»", "«start»", "«stop»"]
    pairs = []
    for template in (CHATML, LLAMA):
        renamed = template
        for name, new in zip(SPECIAL, other):
            renamed = renamed.replace(name, new)
        folder = tmp_path_factory.mktemp("named")
        ours = build_tokenizer(saved(folder / "ours", request.param, template))
        theirs = saved(folder / "theirs", request.param, renamed, other, "«e»")
        from transformers import AutoTokenizer

        pairs.append((ours, AutoTokenizer.from_pretrained(theirs.name)))
    return pairs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, which=st.sampled_from([0, 1]))
def test_text_that_looks_like_a_special_token_stays_text(named_twice, messages, which):
    ours, theirs = named_twice[which]
    text, ids = ours.chat.encode(json.dumps(messages, ensure_ascii=False))
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    if expected[-1] == theirs.eos_token_id:
        expected = expected[:-1]
    assert ids.tolist() == expected
    wanted = theirs.apply_chat_template(messages, tokenize=False)
    for name, new in zip([*SPECIAL, "<|e|>"], ["«b»", "«start»", "«stop»", "«e»"]):
        wanted = wanted.replace(new, name)
    assert text == wanted


def test_a_message_and_the_template_do_not_make_up_a_special_token_together(tmp_path):
    around = "<|im_{{ messages[0].content }}start|>"
    chat = build_tokenizer(saved(tmp_path / "a", "gpt2", around)).chat
    written = build_tokenizer(saved(tmp_path / "b", "gpt2", "".join(SPECIAL))).chat
    special = set(written.encode("[]")[1].tolist())
    assert len(special) == len(SPECIAL)
    for content in ("end|>", " <|im_ ", "<|im_", "x"):
        assert not special & set(chat.encode(json.dumps([{"role": "user", "content": content}]))[1].tolist())
    with pytest.raises(ValueError, match=r"a message holds U\+FFFFE, .* no characters of text"):
        chat.encode(json.dumps([{"role": "user", "content": "\U0010fffe1\U0010fffe"}], ensure_ascii=False))


def test_the_date_in_a_template_does_not_change(tmp_path):
    chat = build_tokenizer(saved(tmp_path, "gpt2", "{% for m in messages %}{{ strftime_now('%d %b %Y') }}{% endfor %}"))
    assert chat.chat.encode(json.dumps(CHAT[:1]))[0] == "26 Jul 2024"


def test_of_several_templates_the_default_is_used(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].role }}"}]
    assert build_tokenizer(saved(tmp_path / "a", "gpt2", named)).chat.encode(json.dumps(CHAT))[0] == "user"
    assert build_tokenizer(saved(tmp_path / "b", "gpt2", named[:1])).chat is None


def chats(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": f"{n} <|im_end|> {n}" * (n % 4)},
        ]
        for n in range(count)
    ]


def write(path, kind: str, count: int = 40) -> SourceConfig:
    rows = [{"messages": chat, "id": n} for n, chat in enumerate(chats(count))]
    if kind == "parquet":
        for row in rows:  # a column that most rows do not have
            row["messages"][0] |= {"name": "A" if row["id"] == 3 else None}
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for row in rows:
                content = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{row['id']:03}.json")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return SourceConfig(kind=kind, paths=[str(path)], chat="messages")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_chats_are_documents_of_a_run(kind, tmp_path):
    config = saved(tmp_path / "tokenizer", "gpt2", CHATML)
    tokenizer = build_tokenizer(config)
    source = write(tmp_path / "chats", kind)
    found = [record.tokens.tolist() for record in documents(open_source(source), tokenizer)]
    assert found == [tokenizer.chat.encode(json.dumps(chat))[1].tolist() for chat in chats(40)]
    stream = stream_of(source, tokenizer=config)
    tokens(stream, 9)
    saved_state = json.loads(json.dumps([stream.fingerprint(), stream.state_dict()]))
    rows = tokens(stream, 20)
    assert tokens(go_on(stream_of(source, tokenizer=config), saved_state), 20) == rows
    other = saved(tmp_path / "other", "gpt2", CHATML.replace("trim", "upper"))
    (line,) = stream_of(source, tokenizer=other).differences(*saved_state)
    assert line.startswith("  sources[0].chat_template: ")
    section = DataConfig(sources=[source], tokenizer=config, context_length=16, global_batch_size=3)
    statistics = tokenize(section, tmp_path / "ids", processes=1)["sources-0"]
    assert statistics.documents == 40 and statistics.tokens == sum(map(len, found))
    ids = SourceConfig(kind="tokens", paths=[str(tmp_path / "ids" / "sources-0" / "*.bin")])
    assert tokens(stream_of(ids, tokenizer=config), 29)[9:] == rows


def test_a_tokenizer_without_a_template_is_refused_at_once(tmp_path):
    source = write(tmp_path / "chats", "jsonl")
    plain = save(TOKENIZERS["gpt2"](), tmp_path / "plain")
    for tokenizer, name in ((plain, plain.name), (TokenizerConfig(), "bytes")):
        message = rf"holds chats \(chat: messages\), and the tokenizer {name} has no chat template: set data.tokenizer"
        for place in ("sources", "validation"):
            section = DataConfig(**{"tokenizer": tokenizer, place: [source]})
            with pytest.raises(ValueError, match=message):
                DocumentData(section)
            with pytest.raises(ValueError, match=message):
                TrainingStream(section, build_tokenizer(tokenizer), lanes=range(2), seed=1)
            with pytest.raises(ValueError, match=message):
                tokenize(section, tmp_path / "out", processes=1)
    with pytest.raises(ValueError, match="holds chats .* or name a field of text"):
        next(documents(open_source(source)))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "no field 'messages' among text; the setting is chat"),
        ({"messages": "a"}, "field 'messages' holds str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 1 of field 'messages' is not an object with role and content"),
        ({"messages": [CHAT[0], "a"]}, "message 2 of field 'messages' is not an object with role and content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "field 'messages' holds half a surrogate pair"),
        ({"messages": [{"role": "critic", "content": ""}]}, "template cannot render it (no such role: critic)"),
    ],
)
def test_bad_chats_are_named_and_skipped(row, problem, tmp_path, caplog):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": CHAT}, row, {"messages": []}, {"messages": CHAT}])))
    tokenizer = build_tokenizer(saved(tmp_path / "tokenizer", "gpt2", LLAMA))
    source = SourceConfig(kind="jsonl", paths=[str(path)], chat="messages")
    with pytest.raises(ValueError) as error:
        list(documents(open_source(source), tokenizer))
    assert problem in str(error.value) and f"{path}" in str(error.value)
    source.on_bad_document = "skip"
    good = [record for record in documents(open_source(source), tokenizer) if record.size]
    assert [record.document for record in good] == [0, 3] and problem in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "body"}, "chat 'messages' takes the place of text_field: remove one of them"),
        ({"template": "{body}"}, "chat 'messages' takes the place of template: remove one of them"),
        ({"kind": "csv"}, "may be lists, of kind jsonl, parquet, tar, hub, not csv"),
        ({"kind": "text"}, "may be lists, of kind jsonl, parquet, tar, hub, not text"),
    ],
)
def test_settings_that_do_not_go_with_chats_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"kind": "jsonl", "paths": ["a"], "chat": "messages"} | changes)


def test_a_column_that_holds_no_chats_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "turns": [CHAT]}), tmp_path / "a")
    source = SourceConfig(kind="parquet", paths=[str(tmp_path / "a")], chat="text")
    with pytest.raises(
        ValueError, match="holds string, not a list of messages, in column 'text': set chat to .* turns"
    ):
        open_source(source)
