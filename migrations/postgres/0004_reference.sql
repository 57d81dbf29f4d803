-- Records are found by what their handlers noted. The index is the column `refs` turned round: no
-- statement has to keep it, records without references have no entry in it, and those that are there
-- already are entered when it is made.

-- One entry of the index: the length keeps ("a", "bc") and ("ab", "c") apart, and no entry is longer
-- than an index takes, as their JSON could be.
create or replace function idempotency.reference_entry(kind text, id text) returns text
language sql immutable strict
as $$ select pg_catalog.length(kind) || ':' || kind || id $$;

-- References that cannot be read have no entries: an index must not keep a record from being written.
create or replace function idempotency.reference_entries(refs text) returns text[]
language plpgsql immutable strict as $$
begin
    return array(
        select idempotency.reference_entry(pair ->> 0, pair ->> 1)
        from pg_catalog.json_array_elements(refs::json) as pair
    );
exception
    when data_exception then
        return '{}';
end
$$;

create index if not exists record_reference on idempotency.record
    using gin (idempotency.reference_entries(refs))
    -- Its list of pending entries would make one completion in many pay for all the others.
    with (fastupdate = off)
    where refs is not null;
