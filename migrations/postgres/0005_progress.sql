-- Recovery points of a leased operation, in the order in which they were finished:
-- [["ordered", 17], ["charged", {"id": "ch_1"}], ...]. Outlives the attempt that wrote it, until the
-- operation is over.
alter table idempotency.record add column if not exists progress text;

-- What can be resumed. Completing a record without progress changes nothing of it (HOT).
create index if not exists record_progress on idempotency.record (id) where progress is not null;
