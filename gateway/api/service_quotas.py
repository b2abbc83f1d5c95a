"""AWS Service Quotas, its read calls (ServiceQuotasV20190624, JSON 1.1): what this host's owner allows an account.

Quotas are the host's to set (limits.profile), not to ask for: a request for an increase is refused.
"""

from __future__ import annotations

from typing import Any

from gateway.accounts.model import Caller
from gateway.accounts.policy import Decision
from gateway.accounts.quotas import Quota

from .errors import AccessDenied, ApiError, InvalidParameter
from .paging import Pager

_SERVICE = {"ServiceCode": "lambda", "ServiceName": "AWS Lambda"}
_READS = ("ListServices", "ListServiceQuotas", "GetServiceQuota", "ListAWSDefaultServiceQuotas", "GetAWSDefaultServiceQuota")


class _Refused(ApiError):
    status = 400
    text_member = "Message"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ServiceQuotas:
    target_prefix, source = "ServiceQuotasV20190624", "servicequotas.amazonaws.com"

    def __init__(self, quotas: list[Quota], pager: Pager, region: str) -> None:
        """`quotas` have a limit: what is not limited is not among them."""
        self._quotas = {quota.code: quota for quota in quotas}
        self._pager = pager
        self._region = region

    async def answer(self, caller: Caller, name: str, call: dict[str, Any]) -> dict[str, Any]:
        """Raises ApiError."""
        if name not in _READS:
            raise _Refused("UnknownOperationException", f"{name} is not served here: quotas are set by the host's limits.profile.")
        if caller.policy.decide(f"servicequotas:{name}", "*", caller.context()) is not Decision.ALLOW:
            raise AccessDenied(f"User: {caller.arn} is not authorized to perform: servicequotas:{name} on resource: *")
        if name == "ListServices":
            return self._page(call, "services", [_SERVICE], "ServiceCode", "Services")
        service = _text(call, "ServiceCode")
        if service != "lambda":
            raise _Refused("NoSuchResourceException", f"The service {service} has no quotas here: only lambda has.")
        account = "" if "AWSDefault" in name else caller.account
        wanted = _text(call, "QuotaCode", is_required=name.startswith("Get"))
        shown = [self._describe(quota, account) for quota in self._quotas.values() if wanted in ("", quota.code)]
        if name.startswith("List"):
            return self._page(call, name, shown, "QuotaCode", "Quotas")
        if not shown:
            raise _Refused("NoSuchResourceException", f"{wanted} is no quota of this host, or it is not limited (limits.profile).")
        return {"Quota": shown[0]}

    def _page(self, call: dict[str, Any], what: str, items: list[dict[str, Any]], key: str, member: str) -> dict[str, Any]:
        most = call.get("MaxResults", 100)
        if not isinstance(most, int) or isinstance(most, bool) or not 1 <= most <= 100:
            raise _Refused("IllegalArgumentException", "MaxResults must be a number from 1 to 100.")
        asked = {"MaxItems": most, "Marker": _text(call, "NextToken", is_required=False)}
        try:
            page, token = self._pager.page(what, items, lambda item: (item[key],), asked)
        except InvalidParameter as error:
            raise _Refused("InvalidPaginationTokenException", str(error).replace("Marker", "Token")) from None
        return {member: page, **({"NextToken": token} if token else {})}

    def _describe(self, quota: Quota, account: str) -> dict[str, Any]:
        rate = {"Period": {"PeriodValue": 1, "PeriodUnit": "SECOND"}} if quota.is_rate else {}
        return {
            **_SERVICE, "QuotaArn": f"arn:aws:servicequotas:{self._region}:{account}:lambda/{quota.code}", "QuotaCode": quota.code,
            "QuotaName": quota.name, "Value": float(quota.value), "Unit": quota.unit, "Adjustable": False, "GlobalQuota": False, **rate,
        }  # fmt: skip


def _text(call: dict[str, Any], name: str, is_required: bool = True) -> str:
    value = call.get(name)
    if (value is None and is_required) or (value is not None and not isinstance(value, str)):
        raise _Refused("IllegalArgumentException", f"{name} must be a string.")
    return value or ""
