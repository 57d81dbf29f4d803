-- Safe to run at every start, and from several processes at once.
set local client_min_messages = warning;
select pg_advisory_xact_lock(hashtext('payments.schema'));

create schema if not exists payments;

create table if not exists payments.charge (
    id text primary key, -- made of the operation's identity: a rerun meets its own row
    account text not null,
    amount bigint not null check (amount > 0), -- minor units
    currency text not null,
    status text not null default 'authorized' check (status in ('authorized', 'captured')),
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
