-- Records are found by what their handlers noted. This table is the column `refs` turned round, and
-- triggers keep it so that no statement can forget to: a record without references costs nothing.
create table if not exists idempotency_reference (
    kind text not null,
    reference text not null,
    id blob not null,
    primary key (kind, reference, id)
) without rowid;

create index if not exists idempotency_reference_id on idempotency_reference (id);

-- References that cannot be read are not entered: an index must not keep a record from being written.
create trigger if not exists idempotency_reference_insert after insert on idempotency_record
when json_valid(new.refs)
begin
    insert or ignore into idempotency_reference (kind, reference, id)
    select json_extract(new.refs, fullkey || '[0]'), json_extract(new.refs, fullkey || '[1]'), new.id
    from json_each(new.refs);
end;

create trigger if not exists idempotency_reference_update after update of refs on idempotency_record
when old.refs is not new.refs
begin
    delete from idempotency_reference where id = old.id;
    insert or ignore into idempotency_reference (kind, reference, id)
    select json_extract(new.refs, fullkey || '[0]'), json_extract(new.refs, fullkey || '[1]'), new.id
    from json_each(case when json_valid(new.refs) then new.refs end);
end;

create trigger if not exists idempotency_reference_delete after delete on idempotency_record
when old.refs is not null
begin
    delete from idempotency_reference where id = old.id;
end;

-- Records that are there already.
insert or ignore into idempotency_reference (kind, reference, id)
select json_extract(refs, fullkey || '[0]'), json_extract(refs, fullkey || '[1]'), record.id
from idempotency_record as record, json_each(case when json_valid(refs) then refs end);
