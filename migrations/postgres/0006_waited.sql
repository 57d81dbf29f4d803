-- Whether a duplicate in another process waits for what becomes of the running attempt. Who ends the
-- attempt sends a notification then, and only then: each takes a lock of the whole database at its
-- commit. In no index, so that setting it stays on the page (HOT).
alter table idempotency.record add column if not exists waited boolean not null default false;

-- What a transactional attempt does first, in one statement whose plans the session keeps.

-- Marks the transaction that handlers write in. Time limits of the application that are stricter stay
-- as they are.
create or replace function idempotency.mark(record_id uuid, token uuid, limit_ms integer) returns void
language plpgsql volatile as $$
declare
    setting text;
begin
    perform pg_catalog.set_config('idempotency.attempt', token::text, true),
        pg_catalog.set_config('idempotency.identity', record_id::text, true);
    if pg_catalog.current_setting('synchronous_commit') = 'off' then
        perform pg_catalog.set_config('synchronous_commit', 'on', true);
    end if;
    foreach setting in array array['statement_timeout', 'idle_in_transaction_session_timeout'] loop
        if pg_catalog.current_setting(setting)::interval
            not between '1 ms' and pg_catalog.make_interval(secs => limit_ms / 1000.0)
        then
            perform pg_catalog.set_config(setting, limit_ms || 'ms', true);
        end if;
    end loop;
end
$$;

create or replace function idempotency.enter(
    record_id uuid, lock bigint, token uuid, limit_ms integer
) returns void
language plpgsql volatile as $$
begin
    perform idempotency.mark(record_id, token, limit_ms);
    perform idempotency.enter(record_id, lock);
end
$$;
