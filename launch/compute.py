"""Errors of Compute Engine, by the codes of its API.

Most commands of `gcloud compute` print only the message of an error:

  ERROR: (gcloud.compute.instance-templates.create) Could not fetch resource:
   - The resource 'projects/p/global/instanceTemplates/s24' already exists

With the flag --log-http, gcloud also prints the API's answers, without tokens
(googlecloudsdk/core/transport.py). Their status and code decide here, not the
message. Needs only Python.
"""

import json
import re
from typing import Any

import commands

# Codes of the errors of an operation and of a managed instance, and reasons of
# a refused request. Those that are not listed are unknown.
_KINDS = {
    "ZONE_RESOURCE_POOL_EXHAUSTED": "capacity",
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": "capacity",
    "RESOURCE_POOL_EXHAUSTED": "capacity", "STOCKOUT": "capacity",
    "QUOTA_EXCEEDED": "quota", "quotaExceeded": "quota",
    "LIMIT_EXCEEDED": "quota",
    "RATE_LIMIT_EXCEEDED": "failed", "rateLimitExceeded": "failed",
    "userRateLimitExceeded": "failed", "OPERATION_RATE_EXCEEDED": "failed",
    "INTERNAL_ERROR": "failed", "SERVICE_UNAVAILABLE": "failed",
    "TIMEOUT": "failed", "RESOURCE_NOT_READY": "failed",
    "RESOURCE_IN_USE_BY_ANOTHER_RESOURCE": "failed",
    "resourceInUseByAnotherResource": "failed",
    "resourceNotReady": "failed",
    "RESOURCE_NOT_FOUND": "absent", "RESOURCE_ALREADY_EXISTS": "exists",
    "PERMISSIONS_ERROR": "refused", "PERMISSION_DENIED": "refused",
    "INVALID_USAGE": "refused", "INVALID_FIELD_VALUE": "refused",
    "BAD_REQUEST": "refused", "UNSUPPORTED_OPERATION": "refused",
    "CONDITION_NOT_MET": "refused"}

_RESPONSE = re.compile(r"^---- response start ----$", re.MULTILINE)
_STATUS = re.compile(r"\s*status: (\d{3})\b")
_BODY = re.compile(r"^-- body start --$(.*?)^-- body end --$",
                   re.MULTILINE | re.DOTALL)


def classified(error: commands.CloudError) -> commands.CloudError:
  """The same error with the kind that the API's last answer gives.

  An error that gcloud itself gives a code for is returned unchanged.
  """
  if error.kind != "unknown":
    return error
  found = _logged(error.err)
  if found is None:
    return error
  kind, message = found
  return commands.CloudError(kind, message, error.out, error.err)


def of_items(errors: Any) -> list[commands.CloudError]:
  """The errors of a list [{"code": ..., "message": ...}, ...] of the API."""
  found = []
  for item in errors if isinstance(errors, list) else ():
    code = commands.value(item, "code", str)
    if code:
      message = commands.value(item, "message", str) or "no reason given"
      found.append(commands.CloudError(_kind(code, item), f"{code}: {message}"))
  return found


def _kind(code: str, item: dict[str, Any]) -> str:
  kind = _KINDS.get(code, "unknown")
  if kind == "quota" and _limit(item) == 0:
    return "refused"  # Waiting does not help.
  return kind


def _limit(item: dict[str, Any]) -> float | None:
  """The quota's limit that an error names."""
  for detail in commands.value(item, "errorDetails", list) or ():
    limit = (detail.get("quotaInfo") or {}).get("limit") if isinstance(
        detail, dict) and isinstance(detail.get("quotaInfo"), dict) else None
    if type(limit) in (int, float):
      return limit
  return None


def _logged(printed: str) -> tuple[str, str] | None:
  """(kind, message) of the error in the last answer that --log-http shows."""
  *_, last = _RESPONSE.split(printed)
  status = _STATUS.match(last)
  if status is None:
    return None
  body = _BODY.search(last)
  error = commands.value(_object(body[1] if body else ""), "error", dict) or {}
  items = commands.value(error, "errors", list) or []
  coded = of_items(items)  # Of an operation, which failed later.
  if coded:
    return coded[0].kind, str(coded[0])
  number = int(status[1])
  if number < 400:
    return None
  name = commands.status_name(number)
  message = commands.value(error, "message", str) or "no reason given"
  reasons = [commands.value(item, "reason", str) for item in items]
  kind = next((_KINDS[r] for r in reasons if r in _KINDS),
              commands.kind_of(name, message))
  return kind, f"{name or number}: {message}"


def _object(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    return None
