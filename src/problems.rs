//! What each `code` of an answer means, and what helps.
//!
//! | code | status | retry helps | meaning |
//! |---|---|---|---|
//! | <span id="key-missing">`key-missing`</span> | 400 | no | The route requires an `Idempotency-Key`. Send one: a UUID made once for each operation, and the same one on every retry. |
//! | <span id="key-invalid">`key-invalid`</span> | 400 | no | The key is empty, too long, sent twice, or has a comma, a control byte or a byte outside ASCII. `detail` says which. |
//! | <span id="scope-missing">`scope-missing`</span> | 403 | no | It cannot be told who is asking. The layer that authenticates has to be outside the idempotency layer. |
//! | <span id="body-too-large">`body-too-large`</span> | 413 | no | The request's body is over the route's limit; nothing was run. |
//! | <span id="body-timeout">`body-timeout`</span> | 408 | after `Retry-After` | The request's body did not arrive within the time allowed; nothing was run. |
//! | <span id="body-unreadable">`body-unreadable`</span> | 400 | after `Retry-After` | The request's body broke off; nothing was run. |
//! | <span id="key-reused">`key-reused`</span> | 409 | no | The key belongs to another request: other body, query, path or content type. Use a new key for a new operation. |
//! | <span id="request-in-progress">`request-in-progress`</span> | 409 | after `Retry-After` | The first request with this key is still running. |
//! | <span id="outcome-unknown">`outcome-unknown`</span> | 409 | once resolved | An attempt was made and nobody knows what came of it. An operator has to look and [`resolve`](crate::Store::resolve) it. |
//! | <span id="answer-not-recorded">`answer-not-recorded`</span> | 503 | after `Retry-After` | The request ran, but whether its answer is recorded could not be found out in time. A retry with the same key gets that answer, or runs where everything was rolled back. |
//! | <span id="response-not-retained">`response-not-retained`</span> | 410 | no | The request ran and was answered with `original.status`; the answer was too large, too slow or a stream. `Location` and `original.references` say what it made. |
//! | <span id="store-unavailable">`store-unavailable`</span> | 503 | after `Retry-After` | The record could not be claimed, so nothing was run. |
//! | <span id="overloaded">`overloaded`</span> | 503 | after `Retry-After` | Too many requests are running; this one was not run. |
//! | <span id="shutting-down">`shutting-down`</span> | 503 | after `Retry-After` | The process is about to end; nothing was run. |
//! | <span id="nested-layers">`nested-layers`</span> | 500 | no | Two layers with different policies cover the route. Take one away. |
//! | <span id="record-unreadable">`record-unreadable`</span> | 500 | no | The record is corrupt, or was written by a newer version. It is neither replayed nor run again; see the log. |
//! | <span id="handler-panicked">`handler-panicked`</span> | 500 | by risk class | The handler panicked. |
//! | <span id="execution-limit">`execution-limit`</span> | 500 | by risk class | The handler took longer than its execution limit and was stopped. |
//! | <span id="response-failed">`response-failed`</span> | 500 | by risk class | The handler's body ended with an error. |
//! | <span id="attempt-lost">`attempt-lost`</span> | 500 | no | An earlier attempt vanished, and the route's policy answers that with a stored 500. |
//! | <span id="transaction-conflict">`transaction-conflict`</span> | 503 | after `Retry-After` | Another transaction was in the way (serialization failure, deadlock), the connection was lost before the commit, or the server had no disk or memory left. Everything was rolled back. |
//! | <span id="transaction-aborted">`transaction-aborted`</span> | 500 | yes | A statement of the handler failed and it answered as if none had, it left a savepoint open, on the store's own connections to PostgreSQL it rolled back by itself or gave up waiting for a savepoint, or the commit was refused by a deferred constraint. Everything was rolled back, the key is free. |
//! | <span id="transaction-ended">`transaction-ended`</span> | 500 | no | The handler has ended its transaction, and has or may have committed by itself. What it committed stays, and the key is [held](#outcome-unknown) for a person: see the log. |
//! | <span id="transaction-held">`transaction-held`</span> | 500 | yes | The handler gave its transaction to something that outlived it. The layer commits nothing. |
//! | <span id="signature-missing">`signature-missing`</span> | 401 | no | A [webhook](crate::webhook) without a signature of a kind that the route knows. Nothing was read but the head. |
//! | <span id="signature-invalid">`signature-invalid`</span> | 401 | once the secret is right | No secret of the route made the signature: a wrong secret, or a body that was changed on its way. Give the new secret beside the old one before the provider takes it. |
//! | <span id="timestamp-missing">`timestamp-missing`</span> | 400 | no | The webhook does not say when it was signed, in seconds since 1970. |
//! | <span id="timestamp-too-old">`timestamp-too-old`</span> | 400 | yes | The signature is right, and older than the route's tolerance: a slow delivery, a wrong clock, or somebody who sends it again. A provider signs each try anew. |
//! | <span id="timestamp-in-future">`timestamp-in-future`</span> | 400 | yes | The signature is right, and its time is further ahead than the route's tolerance. Look at this host's clock. |
//! | <span id="event-id-missing">`event-id-missing`</span> | 400 | no | The webhook does not say which event it is about, or its id is not 1 to 255 visible characters of ASCII. |
//!
//! "By risk class": see [`Risk`](crate::Risk). Every answer is `application/problem+json`
//! ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)) unless a
//! [renderer](crate::IdempotencyLayer::with_renderer) makes something else of it.
