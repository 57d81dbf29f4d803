//! A disk of the server is full: that of its tables, and that of its log.

use faults::client::Pay;
use faults::cluster::Cluster;

use super::{Load, Route, Sent, Service, count, recovers, sent};
use crate::on_both_routes;
use crate::outages::fails_closed;

on_both_routes! {
    d11_while_the_disk_of_the_tables_is_full_nothing_takes_effect_and_it_recovers,
    d12_when_the_disk_of_the_log_is_full_the_server_ends_and_what_was_answered_is_replayed,
}

const MEBIBYTES: u32 = 4;

async fn d11_while_the_disk_of_the_tables_is_full_nothing_takes_effect_and_it_recovers(
    route: Route,
) {
    let cluster = Cluster::start().await;
    let disk = cluster.disk(MEBIBYTES);
    let place = format!(
        "create tablespace small location '{}'",
        disk.path().display()
    );
    let tables = "alter database postgres set default_tablespace = small";
    cluster.execute(&[&place, tables]).await;
    let service = Service::on(route, cluster).await;
    let mut all = service.paid_times(3).await;

    disk.fill();
    // There is room left in blocks that are there already.
    let mut full = Vec::new();
    while service.proxy.traffic().failures("53100") == 0 {
        full.push(sent(&Pay::new(""), service.subject.port).await);
        assert!(full.len() < 500, "it is not full");
    }
    for _ in 0..12 {
        full.push(sent(&Pay::new(""), service.subject.port).await);
    }
    let executed = count(&full, "201") + count(&full, "answer-not-recorded");
    println!("{route:?}: {executed} of {} were executed", full.len());
    for Sent { pay, answer, .. } in &full {
        if ["201", "answer-not-recorded"].contains(&&*answer.kind()) {
            continue;
        }
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.header("retry-after").is_some());
        assert_eq!(service.effects(pay).await, 0);
    }

    disk.make_room();
    recovers(&service.subject).await;
    all.extend(full);
    service.holds(&all).await;
}

/// Too small for a segment more than there is.
const LOG_MEBIBYTES: u32 = 24;

async fn d12_when_the_disk_of_the_log_is_full_the_server_ends_and_what_was_answered_is_replayed(
    route: Route,
) {
    let (cluster, disk) = Cluster::start_with_wal_on_disk(LOG_MEBIBYTES).await;
    let service = Service::on(route, cluster).await;
    let mut all = service.paid_times(3).await;
    disk.fill();
    let load = Load::of(4, "delay=5", service.subject.port);
    service.cluster.write_until_it_panics().await;
    all.extend(load.end().await);
    // It starts again by itself, and may find enough to go on for a moment.
    service.cluster.shut_if_running();
    fails_closed(&service.subject).await;

    disk.make_room();
    service.cluster.boot();
    recovers(&service.subject).await;
    service.holds(&all).await;
}
