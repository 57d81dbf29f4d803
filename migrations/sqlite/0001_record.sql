-- One row is one logical operation: who asked (scope), for what (operation), under which key.
-- Times are seconds since the epoch by the host's clock.
create table if not exists idempotency_record (
    -- 16 bytes of the digest below; a UUIDv7 key puts its 48 bits of time in front.
    id blob primary key not null,
    -- SHA-256 of scope, operation and key; compared on every hit.
    digest blob not null,
    scope text not null,
    operation text not null,
    key text not null,
    state text not null check (state in ('running', 'completed', 'held')),
    -- The secret of the attempt that holds the claim; fences every later write.
    token blob not null,
    attempt integer not null,
    -- What becomes of the operation when its attempt is lost; fixed at claim time.
    lost text not null check (lost in ('rerun', 'answer', 'hold')),
    -- This attempt took over a lost one only to answer that it was lost: it never runs.
    abandoned integer not null default 0,
    fingerprint blob not null,
    claimed_at real not null,
    leased_until real not null,
    expires_at real not null,
    -- When the sweep has to look at the row: the end of the lease while a row to be held is running,
    -- infinite (9e999) while it is held, else the end of its retention.
    sweep_at real not null,
    -- What the handler noted: [["charge", "ch_1"], ...]
    refs text,
    -- The stored answer, in this crate's versioned envelope.
    answer blob,
    check (state <> 'completed' or answer is not null)
) without rowid;

create index if not exists idempotency_record_sweep_at on idempotency_record (sweep_at);
