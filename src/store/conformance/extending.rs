//! How leases are kept alive.

use super::super::Renewed;
use super::*;

pub async fn a_renewed_lease_counts_from_its_renewal<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    for _ in 0..3 {
        subject.age(LEASE - LEASE / 10).await;
        let renewed = store.extend(&[renewal(&first)]).await.unwrap();
        assert_eq!(renewed, [Renewed::Kept]);
    }
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::InProgress { lease_left })
            if *lease_left > LEASE / 2 && *lease_left <= LEASE + TICK
    );
    subject.age(LEASE).await;
    acquire(store, &again(&request)).await;
}

pub async fn a_lease_that_is_over_can_be_renewed_until_somebody_takes_over<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    subject.age(LEASE * 2).await;
    let renewed = store.extend(&[renewal(&first)]).await.unwrap();
    assert_eq!(renewed, [Renewed::Kept]);
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::InProgress { .. })
    );
}

pub async fn renewals_of_several_are_told_apart_in_the_order_given<S: Subject>(subject: S) {
    let store = subject.store();
    let kept = acquire(store, &request("kept")).await;
    let stolen = acquire(store, &request("stolen")).await;
    let absent = acquire(store, &request("absent")).await;
    store.release(&absent).await.unwrap();
    let (done, _) = answered(store, &request("done")).await;
    let last = acquire(store, &request("last")).await;
    let due = [absent, kept, foreign(&stolen), done, last];
    let due: Vec<_> = due.iter().map(renewal).collect();
    let (k, l) = (Renewed::Kept, Renewed::Lost);
    assert_eq!(store.extend(&due).await.unwrap(), [l, k, l, l, k]);
    let reversed: Vec<_> = due.into_iter().rev().collect();
    assert_eq!(store.extend(&reversed).await.unwrap(), [k, l, l, k, l]);
}

pub async fn each_renewal_has_its_own_length<S: Subject>(subject: S) {
    let store = subject.store();
    let (short, long) = (request("short"), request("long"));
    let mut due = [
        renewal(&acquire(store, &short).await),
        renewal(&acquire(store, &long).await),
    ];
    due[1].lease = LEASE * 10;
    store.extend(&due).await.unwrap();
    subject.age(LEASE * 2).await;
    acquire(store, &again(&short)).await;
    must_be!(
        claim(store, &again(&long)).await,
        Claimed::Existing(Existing::InProgress { .. })
    );
}

pub async fn a_foreign_renewal_does_not_lengthen_a_lease<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    subject.age(LEASE / 2).await;
    store.extend(&[renewal(&foreign(&first))]).await.unwrap();
    subject.age(LEASE / 2).await;
    acquire(store, &again(&request)).await;
}

pub async fn no_renewals_are_no_work<S: Subject>(subject: S) {
    let renewed = subject.store().extend(&[]).await.unwrap();
    assert!(renewed.is_empty());
}

pub async fn a_thousand_leases_are_renewed_at_once<S: Subject>(subject: S) {
    let store = subject.store();
    let mut due = Vec::new();
    for n in 0..1000 {
        let request = request(&n.to_string());
        // Two of three are of other processes, or gone.
        if n % 3 == 0 {
            due.push(renewal(&acquire(store, &request).await));
        } else {
            let gone = request.claim(1, std::time::SystemTime::UNIX_EPOCH);
            due.push(renewal(&gone));
        }
    }
    let renewed = store.extend(&due).await.unwrap();
    for (n, renewed) in renewed.iter().enumerate() {
        assert_eq!(*renewed == Renewed::Kept, n % 3 == 0, "of {n}");
    }
}
