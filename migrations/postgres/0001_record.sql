-- One row is one logical operation: who asked (scope), for what (operation), under which key.
create schema if not exists idempotency;

-- Domains, since a session reads their checks once, and those of a table anew for each statement.
do $$
begin
    if pg_catalog.to_regtype('idempotency.record_state') is null then
        create domain idempotency.record_state as text
            check (value in ('running', 'completed', 'held'));
    end if;
    if pg_catalog.to_regtype('idempotency.lost_attempt') is null then
        create domain idempotency.lost_attempt as text check (value in ('rerun', 'answer', 'hold'));
    end if;
end
$$;

create table if not exists idempotency.record (
    -- 16 bytes of the digest below; a UUIDv7 key puts its 48 bits of time in front, which keeps
    -- inserts of one moment on one page of the index.
    id uuid primary key,
    -- SHA-256 of scope, operation and key; compared on every hit.
    digest bytea not null,
    scope text not null,
    operation text not null,
    key text not null,
    state idempotency.record_state not null,
    -- The secret of the attempt that holds the claim; fences every later write.
    token uuid not null,
    attempt integer not null,
    -- What becomes of the operation when its attempt is lost; fixed at claim time.
    lost idempotency.lost_attempt not null,
    -- This attempt took over a lost one only to answer that it was lost: it never runs.
    abandoned boolean not null default false,
    fingerprint bytea not null,
    claimed_at timestamptz not null,
    leased_until timestamptz not null,
    expires_at timestamptz not null,
    -- When the sweep has to look at the row: the end of the lease while a row to be held is running,
    -- 'infinity' while it is held, else the end of its retention. Completing any other row changes
    -- no indexed column, so the update stays on its page (HOT).
    sweep_at timestamptz not null,
    -- What the handler noted: [["charge", "ch_1"], ...]
    refs text,
    -- The stored answer, in this crate's versioned envelope.
    answer bytea,
    check (state <> 'completed' or answer is not null)
) with (
    -- Room on the page for the completing update.
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.05
);

create index if not exists record_sweep_at on idempotency.record (sweep_at);

-- lz4 compresses more than twice as fast as pglz, where the server was built with it.
do $$
begin
    if exists (
        select from pg_catalog.pg_settings
        where name = 'default_toast_compression' and 'lz4' = any (enumvals)
    ) then
        alter table idempotency.record alter column answer set compression lz4;
    end if;
end
$$;
