"""Nothing like a token or a URL's password gets through; what is no secret stays readable."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.track.redact import HIDDEN, is_secret_name, redact, redact_tree, redact_value

WORD = st.text(string.ascii_letters + string.digits, min_size=8, max_size=40)
URL_SAFE = st.text(
    string.ascii_letters + string.digits + "-._~!$&()*+,;=%:@/?#", min_size=1, max_size=30
)
PLAIN = st.text(st.characters(exclude_characters="'\"<>", exclude_categories=["Cs"]), max_size=30)
SECRET_NAMES = st.sampled_from(
    [
        "password",
        "DB_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "api_key",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "client-secret",
        "accessToken",
        "aws.secret.key",
        "pwd",
        "credentials",
    ]
)


@given(
    before=PLAIN,
    user=st.text(string.ascii_lowercase, max_size=8),
    secret=URL_SAFE,
    scheme=st.sampled_from(["http", "https", "postgresql+psycopg2", "mysql", "redis", "s3"]),
)
def test_passwords_in_urls_never_survive(before, user, secret, scheme):
    text = f"{before} {scheme}://{user}:{secret}@host.example:5432/db"
    cleaned = redact(text)
    assert f":{secret}@" not in cleaned
    assert f"{HIDDEN}@host.example:5432/db" in cleaned


@given(
    name=SECRET_NAMES,
    secret=WORD,
    form=st.sampled_from(
        [
            "{n}={s}",
            "{n}: {s}",
            '"{n}": "{s}"',
            "--{n} {s}",
            "--{n}={s}",
            "'{n}':'{s}'",
            "https://h/p?{n}={s}&x=1",
            "export {n}='{s}'",
        ]
    ),
)
def test_named_secrets_never_survive(name, secret, form):
    assert secret not in redact("run " + form.format(n=name, s=secret) + " end")


@given(name=SECRET_NAMES, secret=st.text(min_size=1))
def test_values_under_a_secret_name_are_hidden_whole(name, secret):
    assert redact_value(name, secret) == HIDDEN
    assert redact_tree({"deep": [{name: secret}]}) == {"deep": [{name: HIDDEN}]}


@given(secret=WORD, kind=st.sampled_from(["Bearer", "bearer", "Basic"]))
def test_authorization_headers_never_survive(secret, kind):
    assert secret not in redact(f"curl -H 'Authorization: {kind} {secret}' https://h")


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "A1b2" * 10,
        "hf_" + "Ab3" * 11,
        "sk-proj-" + "Zz9" * 12,
        "xoxb-1234567890-abcdef",
        "AIza" + "Sy1" * 12,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "glpat-" + "x1Y2" * 5,
        "dapi" + "0123456789abcdef" * 2,
    ],
)
@given(before=st.text("abc /=.", max_size=5), after=st.sampled_from(["", " ", ",", "'", ")"]))
def test_known_token_shapes_never_survive(token, before, after):
    text = f"{before} {token}{after}"
    assert token not in redact(text)


def test_private_keys_never_survive():
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc\n-----END RSA PRIVATE KEY-----"
    assert "MIIE" not in redact("x\n" + key) and "MIIE" not in redact("x\n" + key[:60])


def test_this_processs_own_secrets_never_survive(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-looking-word-42")
    assert "plain-looking-word-42" not in redact("failed with plain-looking-word-42 in it")


@given(st.text())
def test_redacting_twice_changes_nothing_more(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/u/ftlib/mlflow.db",
        "http://mlflow.example.org:5000/path",
        "python jobs/phase2.py --mix.mixup-alpha 0.4 --data.path /data/imagenette",
        "s3://bucket/prefix@2",
        "val/top1 = 67.4 at epoch 12",
        "a token ring network",
        "the secret garden",
        "ratio 3:4@2x",
        "tokens/s 120",
        "git@github.com:org/repo.git",
        "author: me",
        "key=value",
        "RuntimeError: 2 tokens",
        "torch==2.14.1 --seed 42",
        "imagenette@ab12cd34",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "lr",
        "mixup_alpha",
        "monkey",
        "keyboard",
        "tokenizer",
        "authors",
        "passes",
        "data.path",
        "seed",
        "compass",
    ],
)
def test_ordinary_names_are_no_secrets(name):
    assert not is_secret_name(name)
