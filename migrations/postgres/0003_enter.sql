-- The first step of a transactional attempt. A lock held until the end of the transaction says that
-- the operation is running; the lookup is a statement of its own, with a snapshot taken after the
-- lock, or a record committed in between would be missed. Refusing by an error ends the transaction
-- that is about to be opened, in the same round trip. Here alone the record is found by an index: the
-- session is the application's to write in, and a plan made while the table was empty is kept.
create or replace function idempotency.enter(record_id uuid, lock bigint) returns void
language plpgsql volatile set enable_seqscan = off as $$
begin
    if not pg_catalog.pg_try_advisory_xact_lock(lock) then
        raise exception using errcode = 'IK001',
            message = 'idempotency: the operation is running in another transaction';
    end if;
    perform from idempotency.record where id = record_id;
    if found then
        raise exception using errcode = 'IK002',
            message = 'idempotency: the operation has a record';
    end if;
end
$$;
