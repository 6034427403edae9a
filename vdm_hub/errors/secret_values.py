"""Secrets in text: what counts as one, whether a value holds one, and text without them.

A secret is known by its value, as that of an environment variable or of the client's stored token, or by its form.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MASK = "***"
_SHORTEST = 4  # of a secret that is known by its value
_SURE = 8  # shorter ones are found as words of their own, and letters or digits alone not at all
_VARIABLE = re.compile(r"(?i)\w*(TOKEN|PASSWORD|PASSWD)S?|(\w*_)?(KEY|SECRET|PASSPHRASE|PAT|CREDENTIALS?)S?")

_LIBRARY = r"(?:hub(?:_[a-z]+)*|xet|transfer|home|token|api)(?![\w-])"
_HF = r"(?<![A-Za-z0-9])hf_"

# Base64 of what holds a colon, as a user and a password do.
_PAIR = r"(?:[A-Za-z0-9+/]{4}){0,99}?(?:O[g-v]|[A-Za-z0-9+/][DTjz][o-r]|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]6)"
_MIXED = r"(?=[\w-]{0,60}[A-Z])(?=[\w-]{0,60}\d)"  # no name is so
# Tokens by their first letters, as their services document them. No hash in hexadecimal is among them.
_TOKENS = (
    r"gh[opsur]_\w{20,}",  # GitHub
    r"github_pat_\w{20,}",
    r"gl(?:pat|ptt|dt|rt|soat|cbt|ft)-[\w-]{16,}",  # GitLab
    r"npm_[A-Za-z0-9]{16,}",
    rf"pypi-{_MIXED}[\w-]{{20,}}",
    r"AIza[\w-]{30,}",  # Google
    r"ya29\.[\w-]{20,}",
    r"GOCSPX-[\w-]{20,}",
    r"xox[abceoprs](?:\.[\w-]{1,9})?-[\w-]{10,}",  # Slack
    r"xapp-[\w-]{20,}",
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # Amazon
    rf"sk-{_MIXED}[\w-]{{20,}}",  # OpenAI, Anthropic and others
    r"(?:[sr]k|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,}",  # Stripe
    r"dckr_[op]at_[\w-]{20,}",  # Docker
    r"SG\.[\w-]{16,64}\.[\w-]{16,}",  # SendGrid
    r"(?:dop|doo|dor)_v1_[0-9a-f]{40,}",  # DigitalOcean
    r"hv[sbr]\.[\w-]{20,}",  # Vault
    r"(?:nvapi-|gsk_|xai-|r8_|shp(?:at|ca|pa|ss)_|lin_api_|PMAK-|dapi)(?=[\w-]{0,60}\d)[\w-]{24,}",
)

# Each repetition that something must follow is bounded: what a file says may cost no more than its length.
_FORMS = (
    # scheme://user:password@host; what follows the colon may also be a port.
    (
        r"(//|\b[A-Za-z][A-Za-z0-9+.-]{1,20}:/)[^\s/?#:@'\"<>]{0,500}:(?!\d{1,5}(?:[/?#\s'\"]|$))\S{0,500}@",
        r"\1***@",
        "a password in an address",
    ),
    # A user alone, where services take a token for one.
    (
        r"(?i)((?:https?|s3|ftps?)://?)(?!\*\*\*@)[^\s/?#:@'\"<>]{1,500}@",
        r"\1***@",
        "the user of an address, which may be a token",
    ),
    # Without a scheme; an address for mail is none.
    (
        r"(?i)(?<![\w/])(?!mailto:)[\w.+-]{1,100}:(?=[^\s/@:]{0,200}[\d\W_])[^\s/@:]{6,200}@"
        r"(?=[\w-]{1,100}(?:\.[\w-]{1,100}){0,9}\.[a-z]{2,})",
        "***@",
        "a password in an address",
    ),
    (
        r"(?i)([?&;#](?:[\w-]{0,40}(?:token|secret|password|passwd|signature|credential|api_?key|access_?key|jwt)"
        r"|auth|key|pwd|sig)=)(?!\*\*\*)[^&#\s'\";,)]+",
        r"\1***",
        "a key in an address",
    ),
    (
        r"(?i)(hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/|discord(?:app)?\.com/api/webhooks/"
        r"|api\.telegram\.org/bot)(?!\*\*\*)[\w/:-]+",
        r"\1***",
        "a hook's address, which is its key",
    ),
    (
        r"(?i)(\b(?:proxy-)?authorization(?:\\?[\"'])?\s{0,9}[:=]\s{0,9}(?:\\?[\"'])?)(?!\*\*\*)"
        r"(?:(?:basic|bearer|digest|token|negotiate|apikey|aws4-hmac-sha256)\s+)?(?!\*\*\*)[^\s\"'\\]{4,}",
        r"\1***",
        "a header that logs in",
    ),
    (rf"(\bBasic\s+)(?={_PAIR})[A-Za-z0-9+/]{{8,}}={{0,2}}", r"\1***", "a user and a password"),
    (r"(\bBearer\s+)[\w.~+/=-]{8,}", r"\1***", "a token"),
    (r"((?:Account|SharedAccess)Key=)(?!\*\*\*)[\w+/=]{20,}", r"\1***", "a key"),
    (r"(?<![A-Za-z0-9])(api_org_)\w+", r"\1***", "a Hugging Face token"),
    (rf"(?<![A-Za-z0-9])(?:{'|'.join(_TOKENS)})", MASK, "a token"),
    (r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}[\w.-]*", MASK, "a token"),
    # To its end, or as far as it is there; what stands before the key in such a block, too.
    (
        r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----)[\w+/=\s\\:,.()-])*"
        r"(?:-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?",
        MASK,
        "a private key",
    ),
    (rf"({_HF})(?!{_LIBRARY})\w[\w-]*", r"\1***", "what may be a Hugging Face token"),
)
_PATTERNS = [(re.compile(pattern), masked, what) for pattern, masked, what in _FORMS]
_LONG = re.compile(rb"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)


def find_secret(value: object) -> str | None:
    """The kind of secret that a value holds, in words and without the secret; ``None`` where it holds none.

    Mappings and sequences are searched whole, keys included, and text also as it reads without the escapes of JSON,
    YAML, HTML, Markdown and addresses.

    >>> find_secret({"unet": {"path": "s3://ada:tiger@bucket/x"}}), find_secret("hf%5Foauth_1x")
    ('a password in an address', 'what may be a Hugging Face token')
    >>> find_secret(["runs/hf", "https://host:8080/x@v1", 0.5])
    """
    return _find(value, _known_values())


def _find(value: object, known: Mapping[str, re.Pattern[str]]) -> str | None:
    for text in _texts(value):
        for reading in _readings(text):
            for name, pattern in known.items():
                if pattern.search(reading):
                    return name
            for pattern, _, what in _PATTERNS:
                if pattern.search(reading):
                    return what
    return None


def find_secret_in_bytes(content: bytes) -> str | None:
    """The kind of secret in bytes that are no text: only known values and long tokens count, which can't be chance."""
    text = content.decode("latin-1")
    found = (name for name, pattern in _known_values().items() if pattern.search(text))
    return next(found, "a Hugging Face token" if _LONG.search(content) else None)


def mask(text: str) -> str:
    """Text without secrets, nor anything that may be one.

    >>> mask("unknown recipe 'hf_abc', https://ada:tiger@host/x?token=1f3c; run hf_hub_download")
    "unknown recipe 'hf_***', https://***@host/x?token=***; run hf_hub_download"
    """
    known = _known_values()
    for pattern in known.values():
        text = pattern.sub(MASK, text)
    for pattern, masked, _ in _PATTERNS:
        text = pattern.sub(masked, text)

    def escaped(word: re.Match[str]) -> str:
        """The word, masked where it hides something by escapes."""
        hides = any(sign in word[0] for sign in "\\%&") and _find(word[0].replace(MASK, ""), known) is not None
        return MASK if hides else word[0]

    return re.sub(r"\S+", escaped, text)


def masked_values(value: Any) -> Any:
    """JSON-like content with what `find_secret` finds in it masked, keys included.

    >>> masked_values({"name": "ftp://ada:tiger@host", "images": 360})
    {'name': 'ftp://***@host', 'images': 360}
    """
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {masked_values(key): masked_values(item) for key, item in value.items()}
    return [masked_values(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _texts(item)
    elif not isinstance(value, bool | float | None) and len(str(value)) > 2:
        yield str(value)


def _readings(text: str) -> set[str]:
    """The text as it stands, and as it reads without escapes, once and twice."""
    if not any(sign in text for sign in "\\%&"):
        return {text}
    once = _unescaped(text)
    return {text, once, _unescaped(once)}


def _unescaped(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code is None:
            return " " if match[4] in "nrt" else match[4]
        return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else ""

    return unquote(html.unescape(_ESCAPE.sub(character, text)))


def _known_values() -> dict[str, re.Pattern[str]]:
    """The secrets of this process, longest first, by what they are."""
    values = {f"the value of {name}": value for name, value in os.environ.items() if _VARIABLE.fullmatch(name)}
    values |= {f"the token in {path}": token for path, token in _stored_tokens()}
    long = {what: value for what, value in values.items() if _is_known(value.strip())}
    return {what: _exactly(value) for what, value in sorted(long.items(), key=lambda item: -len(item[1]))}


def _is_known(value: str) -> bool:
    """Whether a secret's value is long or odd enough not to occur by itself."""
    return len(value) >= _SURE or (len(value) >= _SHORTEST and not value.isalpha() and not value.isdecimal())


def _exactly(value: str) -> re.Pattern[str]:
    """A value, however its words are spaced; a short one, or one of letters alone, only as a word of its own."""
    spaced = r"(?:\s|\\[nrt])+".join(map(re.escape, value.split()))
    alone = value.isalpha() or len(value.strip()) < _SURE
    return re.compile(rf"(?<![A-Za-z0-9]){spaced}(?![A-Za-z0-9])" if alone else spaced)


def _stored_tokens() -> Iterator[tuple[Path, str]]:
    """What ``hf auth login`` stored; read here, since asking the client may renew a token over the network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    token = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or cache) / "token").expanduser()
    for path in (token, token.with_name("stored_tokens")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in (line for line in lines if not line.startswith("[")):
            yield path, line.partition("=")[2].strip() or line.strip()
