-- The first step of a transactional attempt. A lock held until the end of the transaction says that the
-- operation is running; the lookup is a statement of its own, with a snapshot taken after the lock, or
-- a record committed in between would be missed. Its plan is kept by the session. Refusing by an error
-- leaves nothing of a transaction that is about to be opened, in the same round trip. Only in this function
-- the record is found by an index: the session is the application's to write in, and a plan made while the
-- table was empty is kept. It reads the column that was added last: on a schema that is too old for this
-- crate, nothing begins.
create or replace function idempotency.enter(record_id uuid, lock bigint) returns void
language plpgsql volatile set enable_seqscan = off as $$
begin
    if not pg_catalog.pg_try_advisory_xact_lock(lock) then
        raise exception using errcode = 'IK001',
            message = 'idempotency: the operation is running in another transaction';
    end if;
    perform waited from idempotency.record where id = record_id;
    if found then
        raise exception using errcode = 'IK002',
            message = 'idempotency: the operation has a record';
    end if;
end
$$;

-- What the transactions of handlers need where a setting is not PostgreSQL's default. Time limits of the
-- application that are stricter stay as they are. An assignment, where the result is of no use, takes no
-- run of the executor.
create or replace function idempotency.limit(limit_ms integer) returns text
language plpgsql volatile as $$
declare
    setting text;
    unused text;
begin
    if pg_catalog.current_setting('synchronous_commit') = 'off' then
        unused := pg_catalog.set_config('synchronous_commit', 'on', true);
    end if;
    foreach setting in array array['statement_timeout', 'idle_in_transaction_session_timeout'] loop
        if pg_catalog.current_setting(setting)::interval
            not between '1 ms' and pg_catalog.make_interval(secs => limit_ms / 1000.0)
        then
            unused := pg_catalog.set_config(setting, limit_ms::text, true);
        end if;
    end loop;
    return null;
end
$$;
