//! Random faults for as long as one likes, a history of all that clients saw, and a checker of it.
//!
//! The *driver* ([`run`]) starts a PostgreSQL server and a few subjects ([`service`]), each behind a proxy
//! of its own. Clients ([`load`]) send the operations of a [`plan`], each several times, while the
//! steps of a [`schedule`] are done to subjects, connections and the server ([`inject`]). Then all faults
//! are taken away, and everything has to come to an end. What clients saw is compared with the
//! invariants while it happens ([`checker`]), and with the database at the end ([`audit`]).
//!
//! A seed determines the plan and the schedule; when things happen is up to the machine.

pub mod audit;
pub mod checker;
pub mod counts;
pub mod history;
pub mod inject;
pub mod load;
pub mod options;
pub mod plan;
pub mod run;
pub mod schedule;
pub mod service;
