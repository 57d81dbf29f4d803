// Runs stripe-node, unmodified, against stripe-server. Arguments: the server's port.
'use strict';

const assert = require('node:assert/strict');
const { randomUUID } = require('node:crypto');
const Stripe = require('stripe');

const port = Number(process.argv[2]);
const RETRIES = 6;

// An account of its own for every check, so that none sees what another did.
class Account {
  constructor() {
    this.name = randomUUID().replaceAll('-', '');
  }

  client(settings = {}, number = 1) {
    return new Stripe(`sk_test_${this.name}_${number}`, {
      host: '127.0.0.1',
      port,
      protocol: 'http',
      maxNetworkRetries: RETRIES,
      timeout: 20_000,
      telemetry: false,
      ...settings,
    });
  }

  async ask(method, path) {
    const authorization = `Bearer sk_test_${this.name}_0`;
    const response = await fetch(`http://127.0.0.1:${port}${path}`, { method, headers: { authorization } });
    assert.ok(response.ok, `${path} is answered with ${response.status}`);
    return response;
  }

  async seen() {
    return (await this.ask('GET', '/runs')).json();
  }

  async lose(moment) {
    await this.ask('POST', `/lose/${moment}`);
  }

  // When the handler has started.
  async started() {
    const deadline = Date.now() + 10_000;
    while ((await this.seen()).runs === 0) assert.ok(Date.now() < deadline, 'the handler did not start');
  }
}

const charge = (more = {}) => ({ amount: 2000, currency: 'eur', ...more });
const slow = () => charge({ metadata: { delay_ms: 1500 } });
const ends = (end) => charge({ metadata: { end } });
const withKey = () => ({ idempotencyKey: randomUUID() });

const isReplay = (answer) => (answer.lastResponse ?? answer).headers['idempotent-replayed'] === 'true';

function assertReplay(first, replay) {
  assert.equal(first.object, 'charge');
  assert.deepEqual(replay, first);
  assert.ok(!isReplay(first), 'the first answer is marked as a replay');
  assert.ok(isReplay(replay), 'the replay is not marked');
}

async function refused(promise, type, status, code) {
  const error = await promise.then(
    () => assert.fail(`no ${type} was raised`),
    (error) => error,
  );
  assert.equal(error.type, type, `${error.type} was raised: ${error.message}`);
  assert.equal(error.statusCode, status);
  if (code) assert.equal(error.code, code);
  return error;
}

const checks = {
  async 'replay'(account) {
    const options = withKey();
    const first = await account.client().charges.create(charge(), options);
    const replay = await account.client().charges.create(charge(), options);
    assertReplay(first, replay);
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'replay to another API key of the account'(account) {
    const options = withKey();
    const first = await account.client({}, 1).charges.create(charge(), options);
    const replay = await account.client({}, 2).charges.create(charge(), options);
    assertReplay(first, replay);
  },

  async 'no replay to another account'(account) {
    const options = withKey();
    const first = await account.client().charges.create(charge(), options);
    const other = await new Account().client().charges.create(charge(), options);
    assert.notEqual(other.id, first.id);
    assert.ok(!isReplay(other));
  },

  async 'form in another order'(account) {
    const options = withKey();
    const first = await account.client().charges.create({ amount: 2000, currency: 'eur', metadata: { a: '1', b: '2' } }, options);
    const replay = await account.client().charges.create({ metadata: { b: '2', a: '1' }, currency: 'eur', amount: 2000 }, options);
    assertReplay(first, replay);
  },

  async 'automatic retry after a lost answer'(account) {
    await account.lose('answer');
    const replay = await account.client().charges.create(charge());
    assert.ok(isReplay(replay));
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'automatic retry after a connection lost in the middle'(account) {
    await account.lose('waiting');
    const replay = await account.client().charges.create(slow());
    assert.ok(isReplay(replay));
    const seen = await account.seen();
    assert.equal(seen.runs, 1);
    assert.ok(seen.conflicts > 0, 'the retry did not meet the first request');
  },

  async 'in progress, retried until the replay'(account) {
    const options = withKey();
    const first = account.client().charges.create(slow(), options);
    await account.started();
    const replay = await account.client().charges.create(slow(), options);
    assertReplay(await first, replay);
    const seen = await account.seen();
    assert.equal(seen.runs, 1);
    assert.ok(seen.conflicts > 0, 'the second request did not meet the first');
  },

  async 'in progress, without retries'(account) {
    const options = withKey();
    const first = account.client().charges.create(slow(), options);
    await account.started();
    const second = account.client({ maxNetworkRetries: 0 }).charges.create(slow(), options);
    // The SDK makes idempotency errors of 400 and 404 only.
    const error = await refused(second, 'StripeAPIError', 409, 'idempotency_key_in_use');
    assert.equal(error.rawType, 'idempotency_error');
    await first;
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 1, runs: 1 });
  },

  async 'mismatch'(account) {
    const options = withKey();
    await account.client().charges.create(charge(), options);
    const other = account.client().charges.create(charge({ amount: 3000 }), options);
    await refused(other, 'StripeIdempotencyError', 400, 'key-reused');
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'mismatch while the first runs'(account) {
    const options = withKey();
    const first = account.client().charges.create(slow(), options);
    await account.started();
    const other = account.client().charges.create(charge({ amount: 3000 }), options);
    await refused(other, 'StripeIdempotencyError', 400, 'key-reused');
    await first;
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'missing key'(account) {
    // The SDK sends a key with every POST, so its HTTP client has to take the key off.
    const httpClient = Stripe.createNodeHttpClient();
    const send = httpClient.makeRequest.bind(httpClient);
    httpClient.makeRequest = (host, at, path, method, { 'Idempotency-Key': _, ...headers }, ...rest) =>
      send(host, at, path, method, headers, ...rest);
    const answer = account.client({ httpClient }).charges.create(charge());
    await refused(answer, 'StripeInvalidRequestError', 400, 'key-missing');
    assert.deepEqual(await account.seen(), { requests: 1, conflicts: 0, runs: 0 });
  },

  async 'malformed key'(account) {
    const answer = account.client().charges.create(charge(), { idempotencyKey: 'k'.repeat(256) });
    await refused(answer, 'StripeInvalidRequestError', 400, 'key-invalid');
    assert.deepEqual(await account.seen(), { requests: 1, conflicts: 0, runs: 0 });
  },

  async 'declined card'(account) {
    const options = withKey();
    const pay = () => account.client().charges.create(ends('declined'), options);
    assert.ok(!isReplay(await refused(pay(), 'StripeCardError', 402, 'card_declined')));
    assert.ok(isReplay(await refused(pay(), 'StripeCardError', 402, 'card_declined')));
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'stored failure'(account) {
    const answer = account.client({ maxNetworkRetries: 1 }).charges.create(ends('failed'));
    assert.ok(isReplay(await refused(answer, 'StripeAPIError', 500)));
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'stored failure that says not to retry'(account) {
    const options = withKey();
    const pay = () => account.client().charges.create(ends('failed-for-good'), options);
    assert.ok(!isReplay(await refused(pay(), 'StripeAPIError', 500)));
    assert.ok(isReplay(await refused(pay(), 'StripeAPIError', 500)));
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },

  async 'panic'(account) {
    const options = withKey();
    const pay = () => account.client().charges.create(ends('panic'), options);
    assert.ok(!isReplay(await refused(pay(), 'StripeAPIError', 500, 'handler-panicked')));
    assert.ok(isReplay(await refused(pay(), 'StripeAPIError', 500, 'handler-panicked')));
    assert.deepEqual(await account.seen(), { requests: 2, conflicts: 0, runs: 1 });
  },
};

// What stays if a check waits for something that never comes.
process.exitCode = 1;

(async () => {
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check(new Account());
      console.log(`node ${name} ok`);
    } catch (error) {
      console.log(`node ${name} FAILED: ${String(error.message).replace(/\s+/g, ' ')}`);
    }
  }
  // Idle connections would keep the process for a while.
  process.exit(0);
})();
