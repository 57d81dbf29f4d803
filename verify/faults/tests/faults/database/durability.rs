//! A server that acknowledges commits before they are durable.

use faults::durability::Plain;
use faults::matrix::size;

use super::{Route, Service, recovers};
use crate::on_both_routes;

on_both_routes! {
    d15_an_answer_outlives_a_crash_right_after_it_where_commits_do_not_wait_for_the_disk,
}

async fn d15_an_answer_outlives_a_crash_right_after_it_where_commits_do_not_wait_for_the_disk(
    route: Route,
) {
    let service = Service::start(route).await;
    let plain = Plain::new(&service.cluster).await;
    let (mut all, mut lost) = (Vec::new(), 0);
    for _ in 0..size("D15") {
        plain.is_asynchronous(&service.cluster).await;
        all.push(service.paid().await);
        // Not before, or the answer's commit would take it along to the disk.
        let commit = plain.commit(&service.cluster).await;
        service.cluster.shut("immediate");
        service.cluster.boot();
        lost += u64::from(plain.is_lost(&service.cluster, commit).await);
        recovers(&service.subject).await;
        service.holds(&all[all.len() - 1..]).await;
    }
    println!("{lost} of {} plain commits were lost", all.len());
    assert!(lost > 0, "plain commits are durable, too");
    service.holds(&all).await;
}
