do $$
begin
    if pg_catalog.to_regtype('idempotency.message_state') is null then
        create domain idempotency.message_state as text
            check (value in ('pending', 'sent', 'dead', 'discarded'));
    end if;
end
$$;

-- Messages that commit with the writes they tell of. Debezium's outbox event router reads the columns
-- id, aggregatetype, aggregateid, type and payload under these names.
create table if not exists idempotency.outbox (
    -- A UUIDv7, made by the crate: the same for each time a message is published.
    id uuid primary key,
    -- The order of commits within a partition: assigned under the partition's lock, which is held to
    -- the end of the transaction. Between partitions it says nothing.
    position bigint generated always as identity,
    partition_key text collate "C" not null,
    aggregatetype text not null,
    aggregateid text not null,
    -- The topic.
    type text not null,
    -- json and not jsonb: every byte stays as it was written.
    payload json not null,
    -- {"name": "value", ...}
    headers json not null,
    -- Which record's request has written it: idempotency.record.id.
    operation_id uuid,
    created_at timestamptz not null default clock_timestamp(),
    -- 'pending' until published, or until a person has to decide ('dead').
    state idempotency.message_state not null default 'pending',
    -- The secret of the relay that claimed it last; fences every later write.
    token uuid,
    -- How often it was claimed.
    attempt integer not null default 0,
    -- From when on a relay may claim it: the end of a lease, or of a pause after a failure.
    available_at timestamptz not null default clock_timestamp(),
    -- When it was sent, given up or discarded.
    finished_at timestamptz,
    last_error text,
    check ((state = 'pending') = (finished_at is null))
) with (
    -- Room on the page for claiming, which changes no indexed column.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.05
);

-- The first row of a partition is its head.
create index if not exists outbox_unsent on idempotency.outbox (partition_key, position)
    where state in ('pending', 'dead');

create index if not exists outbox_dead on idempotency.outbox (position) where state = 'dead';

create index if not exists outbox_finished on idempotency.outbox (finished_at)
    where state in ('sent', 'discarded');

-- Messages that were taken in, one row for each.
create table if not exists idempotency.inbox (
    source text collate "C" not null,
    message_id text collate "C" not null,
    received_at timestamptz not null default clock_timestamp(),
    primary key (source, message_id)
);

create index if not exists inbox_received_at on idempotency.inbox (received_at);

-- How far the messages about an entity were taken in, where they are numbered.
create table if not exists idempotency.inbox_order (
    source text collate "C" not null,
    entity text collate "C" not null,
    sequence bigint not null,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (source, entity)
) with (fillfactor = 70);
