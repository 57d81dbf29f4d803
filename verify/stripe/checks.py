"""Runs stripe-python, unmodified, against stripe-server. Arguments: the server's port."""

import json
import sys
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import stripe

BASE = f"http://127.0.0.1:{int(sys.argv[1])}"
RETRIES = 6
CHECKS = {}

stripe.api_base = BASE
stripe.enable_telemetry = False
stripe.max_network_retries = RETRIES
stripe.default_http_client = stripe.RequestsClient(timeout=20)
threads = ThreadPoolExecutor()


class Account:
    """One of its own for every check, so that none sees what another did."""

    def __init__(self):
        self.name = uuid.uuid4().hex

    def pay(self, params, *, number=1, retries=RETRIES, **options):
        stripe.max_network_retries = retries
        key = f"sk_test_{self.name}_{number}"
        return stripe.Charge.create(api_key=key, **options, **params)

    def ask(self, method, path):
        headers = {"Authorization": f"Bearer sk_test_{self.name}_0"}
        request = urllib.request.Request(BASE + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read()

    def seen(self):
        return json.loads(self.ask("GET", "/runs"))

    def lose(self, moment):
        self.ask("POST", f"/lose/{moment}")

    def started(self):
        """Returns when the handler has started."""
        deadline = time.monotonic() + 10
        while self.seen()["runs"] == 0:
            require(time.monotonic() < deadline, "the handler did not start")


def check(name):
    def add(function):
        CHECKS[name] = function
        return function

    return add


def require(condition, reason):
    if not condition:
        raise AssertionError(reason)


def equal(actual, expected):
    require(actual == expected, f"{actual!r} is not {expected!r}")


def charge(**more):
    return {"amount": 2000, "currency": "eur", **more}


def slow():
    return charge(metadata={"delay_ms": "1500"})


def ends(end):
    return charge(metadata={"end": end})


def new_key():
    return str(uuid.uuid4())


def is_replay(answer):
    """Of a charge or of an error."""
    headers = answer.headers if isinstance(answer, Exception) else answer.last_response.headers
    return headers.get("idempotent-replayed") == "true"


def require_replay(first, replay):
    equal(first.object, "charge")
    equal(replay.last_response.body, first.last_response.body)
    require(not is_replay(first), "the first answer is marked as a replay")
    require(is_replay(replay), "the replay is not marked")


def refused(pay, kind, status, code=None):
    try:
        pay()
    except stripe.StripeError as error:
        require(type(error) is kind, f"{type(error).__name__} was raised: {error}")
        equal(error.http_status, status)
        if code:
            # Some classes of the SDK drop it from `error.code`.
            equal(error.error.code, code)
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def seen(account, requests, conflicts, runs):
    equal(account.seen(), {"requests": requests, "conflicts": conflicts, "runs": runs})


@check("replay")
def _(account):
    key = new_key()
    first = account.pay(charge(), idempotency_key=key)
    replay = account.pay(charge(), idempotency_key=key)
    require_replay(first, replay)
    seen(account, 2, 0, 1)


@check("replay to another API key of the account")
def _(account):
    key = new_key()
    first = account.pay(charge(), idempotency_key=key, number=1)
    replay = account.pay(charge(), idempotency_key=key, number=2)
    require_replay(first, replay)


@check("no replay to another account")
def _(account):
    key = new_key()
    first = account.pay(charge(), idempotency_key=key)
    other = Account().pay(charge(), idempotency_key=key)
    require(other.id != first.id, "two accounts share a charge")
    require(not is_replay(other), "the other account's answer is marked as a replay")


@check("form in another order")
def _(account):
    key = new_key()
    one = {"amount": 2000, "currency": "eur", "metadata": {"a": "1", "b": "2"}}
    other = {"metadata": {"b": "2", "a": "1"}, "currency": "eur", "amount": 2000}
    first = account.pay(one, idempotency_key=key)
    replay = account.pay(other, idempotency_key=key)
    require_replay(first, replay)


@check("automatic retry after a lost answer")
def _(account):
    account.lose("answer")
    replay = account.pay(charge())
    require(is_replay(replay), "the retry is not marked as a replay")
    seen(account, 2, 0, 1)


@check("automatic retry after a connection lost in the middle")
def _(account):
    account.lose("waiting")
    replay = account.pay(slow())
    require(is_replay(replay), "the retry is not marked as a replay")
    now = account.seen()
    equal(now["runs"], 1)
    require(now["conflicts"] > 0, "the retry did not meet the first request")


@check("in progress, retried until the replay")
def _(account):
    key = new_key()
    first = threads.submit(account.pay, slow(), idempotency_key=key)
    account.started()
    replay = account.pay(slow(), idempotency_key=key)
    require_replay(first.result(), replay)
    now = account.seen()
    equal(now["runs"], 1)
    require(now["conflicts"] > 0, "the second request did not meet the first")


@check("in progress, without retries")
def _(account):
    key = new_key()
    first = threads.submit(account.pay, slow(), idempotency_key=key)
    account.started()
    pay = partial(account.pay, slow(), idempotency_key=key, retries=0)
    # The SDK makes idempotency errors of 400 and 404 only.
    error = refused(pay, stripe.APIError, 409, "idempotency_key_in_use")
    equal(error.error.type, "idempotency_error")
    first.result()
    seen(account, 2, 1, 1)


@check("mismatch")
def _(account):
    key = new_key()
    account.pay(charge(), idempotency_key=key)
    pay = partial(account.pay, charge(amount=3000), idempotency_key=key)
    refused(pay, stripe.IdempotencyError, 400, "key-reused")
    seen(account, 2, 0, 1)


@check("mismatch while the first runs")
def _(account):
    key = new_key()
    first = threads.submit(account.pay, slow(), idempotency_key=key)
    account.started()
    pay = partial(account.pay, charge(amount=3000), idempotency_key=key)
    refused(pay, stripe.IdempotencyError, 400, "key-reused")
    first.result()
    seen(account, 2, 0, 1)


class Keyless(stripe.RequestsClient):
    """The SDK sends a key with every POST, so its HTTP client has to take the key off."""

    def request(self, method, url, headers, post_data=None, **more):
        headers = {name: value for name, value in headers.items() if name != "Idempotency-Key"}
        return super().request(method, url, headers, post_data, **more)


@check("missing key")
def _(account):
    usual = stripe.default_http_client
    stripe.default_http_client = Keyless(timeout=20)
    try:
        refused(partial(account.pay, charge()), stripe.InvalidRequestError, 400, "key-missing")
    finally:
        stripe.default_http_client = usual
    seen(account, 1, 0, 0)


@check("malformed key")
def _(account):
    pay = partial(account.pay, charge(), idempotency_key="k" * 256)
    refused(pay, stripe.InvalidRequestError, 400, "key-invalid")
    seen(account, 1, 0, 0)


@check("declined card")
def _(account):
    key = new_key()
    pay = partial(account.pay, ends("declined"), idempotency_key=key)
    first = refused(pay, stripe.CardError, 402, "card_declined")
    replay = refused(pay, stripe.CardError, 402, "card_declined")
    equal((is_replay(first), is_replay(replay)), (False, True))
    equal(replay.http_body, first.http_body)
    seen(account, 2, 0, 1)


@check("stored failure")
def _(account):
    error = refused(partial(account.pay, ends("failed"), retries=1), stripe.APIError, 500)
    require(is_replay(error), "the retry is not marked as a replay")
    seen(account, 2, 0, 1)


@check("stored failure that says not to retry")
def _(account):
    key = new_key()
    pay = partial(account.pay, ends("failed-for-good"), idempotency_key=key)
    first = refused(pay, stripe.APIError, 500)
    replay = refused(pay, stripe.APIError, 500)
    equal((is_replay(first), is_replay(replay)), (False, True))
    seen(account, 2, 0, 1)


@check("panic")
def _(account):
    key = new_key()
    pay = partial(account.pay, ends("panic"), idempotency_key=key)
    first = refused(pay, stripe.APIError, 500, "handler-panicked")
    replay = refused(pay, stripe.APIError, 500, "handler-panicked")
    equal((is_replay(first), is_replay(replay)), (False, True))
    seen(account, 2, 0, 1)


for name, function in CHECKS.items():
    try:
        function(Account())
        print(f"python {name} ok", flush=True)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"python {name} FAILED: {reason}", flush=True)
