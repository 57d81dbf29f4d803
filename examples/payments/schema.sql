-- Safe to run at every start, and from several processes at once.
set local client_min_messages = warning;
select pg_advisory_xact_lock(hashtext('payments.schema'));

create schema if not exists payments;

create table if not exists payments.charge (
    id text primary key, -- made of the operation's identity
    account text not null,
    amount bigint not null check (amount > 0), -- minor units
    currency text not null,
    status text not null default 'authorized'
        check (status in ('authorized', 'captured', 'settled', 'disputed')),
    refunded bigint not null default 0 check (refunded between 0 and amount),
    created_at timestamptz not null default clock_timestamp()
);
create index if not exists charge_account on payments.charge (account, created_at);

-- Money that moved: from one book to another, never changed, never deleted.
create table if not exists payments.ledger (
    id text primary key, -- one row for each operation, whatever happens
    charge text not null references payments.charge,
    debit text not null,
    credit text not null check (credit <> debit),
    amount bigint not null check (amount > 0),
    currency text not null,
    created_at timestamptz not null default clock_timestamp()
);
create index if not exists ledger_charge on payments.ledger (charge);

create table if not exists payments.profile (
    member text primary key,
    name text not null
);

-- What the consumer makes of the messages. It has no unique column: the inbox alone keeps a message from
-- being written twice.
create table if not exists payments.statement (
    position bigint generated always as identity primary key,
    account text not null,
    event text not null,
    charge text not null,
    amount bigint not null,
    currency text not null
);
create index if not exists statement_account on payments.statement (account, position);
