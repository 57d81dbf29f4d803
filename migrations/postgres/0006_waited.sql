-- Whether a duplicate in another process waits for what becomes of the running attempt. Who ends the
-- attempt sends a notification then, and only then: each takes a lock of the whole database at its
-- commit. In no index, so that setting it stays on the page (HOT).
alter table idempotency.record add column if not exists waited boolean not null default false;
