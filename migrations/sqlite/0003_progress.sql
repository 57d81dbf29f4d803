-- Recovery points of a leased operation, in the order in which they were finished:
-- [["ordered", 17], ["charged", {"id": "ch_1"}], ...]. Outlives the attempt that wrote it, until the
-- operation is over.
alter table idempotency_record add column progress text;

-- What can be resumed.
create index if not exists idempotency_record_progress on idempotency_record (id)
where progress is not null;
