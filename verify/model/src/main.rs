//! tmp
use model::lease::*;
use model::{Bounds, check};
fn main() {
    let n: Vec<usize> = std::env::args()
        .nth(1)
        .unwrap()
        .split('x')
        .map(|x| x.parse().unwrap())
        .collect();
    let fault = match std::env::args().nth(2).as_deref() {
        Some("wait") => Some(Fault::TrustsLastClaim),
        _ => None,
    };
    for (class, handler) in [
        (Class::Critical, Handler::Asks),
        (Class::High, Handler::Asks),
        (Class::Medium, Handler::Asks),
        (Class::Medium, Handler::Phase),
    ] {
        let report = check(
            Lease {
                bounds: Bounds::new(n[0], n[1], n[2], n[3]),
                class,
                handler,
                fault,
            },
            2,
        );
        println!(
            "{class:?} {handler:?} {} depth {} {:?}",
            report.states, report.depth, report.took
        );
        for (name, path) in report.failed {
            println!("FAILED {name}\n{}", path.unwrap_or_default());
        }
    }
}
