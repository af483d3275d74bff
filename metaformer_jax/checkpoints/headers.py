"""What a server says of a file in the headers of its responses."""

import base64
import binascii
import contextlib
import dataclasses
import email.utils
import http.client
import json
import pathlib
import re
import time
import urllib.parse
from collections.abc import Sequence

from metaformer_jax.config import json_data

# RFC 9530: "sha-256=:BASE64:".
_DIGEST = re.compile(r"\b(sha-256|sha-512)=:([A-Za-z0-9+/]+=*):", re.I)


class SizesDiffer(ValueError):
  """The headers name several sizes."""


@dataclasses.dataclass
class Facts:
  """What is known of a file.

  Attributes:
    validator: its ETag or time of change, which a changed file does not have;
      empty if there is none.
    size: in bytes.
    digests: hexadecimal, or their beginnings, by their names in hashlib.
  """

  validator: str = ""
  size: int | None = None
  digests: dict[str, str] = dataclasses.field(default_factory=dict)

  def write(self, path: pathlib.Path) -> None:
    """Notes them, for a later process."""
    path.write_text(json.dumps(dataclasses.asdict(self)))


def read(path: pathlib.Path) -> Facts:
  """What `Facts.write` has noted; nothing if that cannot be read."""
  try:
    found = Facts(**json_data.read(path))
    valid = (isinstance(found.validator, str)
             and isinstance(found.size, int | None)
             and {"md5", "sha256", "sha512"}.issuperset(dict(found.digests)))
  except (OSError, ValueError, TypeError):
    valid = False
  return found if valid else Facts()


def facts(response: http.client.HTTPResponse,
          redirects: Sequence[http.client.HTTPMessage]) -> Facts:
  """What a response, and the redirects to it, say of the whole file.

  Raises:
    SizesDiffer: they name several sizes.
  """
  headers = response.headers
  sizes = [h.get("X-Linked-Size", "") for h in (*redirects, headers)]
  if response.status == 206:  # bytes FIRST-LAST/SIZE
    sizes.append(headers.get("Content-Range", "").rpartition("/")[2])
  else:
    sizes.append(headers.get("Content-Length", ""))
  found = {int(size) for size in sizes if size.isdecimal()}
  if len(found) > 1:
    raise SizesDiffer(
        f"it names several sizes, {', '.join(map(str, sorted(found)))} bytes")
  # A weak ETag does not identify the bytes (RFC 9110, section 13.1.5).
  etag = headers.get("ETag", "")
  validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
  return Facts(validator, next(iter(found), None),
               _digests(response, redirects))


def first_byte(response: http.client.HTTPResponse) -> int | None:
  """Where the part begins that a response of status 206 has."""
  match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
  return int(match[1]) if match else None


def _digests(response: http.client.HTTPResponse,
             redirects: Sequence[http.client.HTTPMessage]) -> dict[str, str]:
  found = {}
  # As torch.hub names files, with the digest's beginning: net-f37072fd.pth.
  name = urllib.parse.urlsplit(response.url).path.rpartition("/")[2]
  if match := re.search(r"-([0-9a-f]{8,64})\.", name):
    found["sha256"] = match[1]
  for headers in (*redirects, response.headers):
    for name, value in _DIGEST.findall(headers.get("Repr-Digest", "")):
      found[name.lower().replace("-", "")] = _hex(value)
    # That of the Hugging Face hub for a large file is its SHA-256.
    if etag := sha256_of_etag(headers.get("X-Linked-Etag")):
      found["sha256"] = etag
  if response.status == 200:  # Of a part, it is the part's.
    found["md5"] = _hex(response.headers.get("Content-MD5", ""))
  return {name: value for name, value in found.items() if value}


def sha256_of_etag(etag: str | None) -> str | None:
  """The digest that an ETag is by its form."""
  match = re.fullmatch('(?:W/)?"?([0-9a-f]{64})"?', etag or "")
  return match and match[1]


def _hex(value: str) -> str:
  """A digest in base64 as hexadecimal; empty if it is not valid."""
  with contextlib.suppress(binascii.Error):
    return base64.b64decode(value, validate=True).hex()
  return ""


def retry_after(headers: http.client.HTTPMessage) -> float:
  """The seconds that a server asks to wait."""
  value = headers.get("Retry-After", "").strip()
  if value.isdecimal():
    return float(value)
  try:
    then = email.utils.parsedate_to_datetime(value)
    return max(0.0, then.timestamp() - time.time())
  except (ValueError, TypeError, OverflowError):
    return 0.0
