//! S11's allocations and S12, which another program counts: its allocator would cost the servers
//! something.

use std::collections::HashMap;
use std::process::Command;

use crate::suite::Suite;

impl Suite {
    pub(crate) async fn memory(&mut self) {
        if !self.wants(&["S11", "S12"]) {
            return;
        }
        let counted = tokio::task::spawn_blocking(count).await;
        let counted = counted.expect("it counts");
        let of = |name: &str| counted[name];
        let report = &mut self.report;
        report.ratio("S11-allocations-of-its-own", [of("allocations")]);
        for size in ["1", "16"] {
            let [parked, peak, bound] =
                ["parked", "peak", "bound"].map(|name| of(&format!("{name}-{size}")));
            let without = of(&format!("without-{size}"));
            report.note(&format!("S12-without-the-layer-at-{size}-KB"), without, "B");
            report.note(&format!("S12-parked-at-{size}-KB"), parked, "B");
            report.note(&format!("S12-peak-at-{size}-KB"), peak, "B");
            let name = format!("S12-memory-of-its-bound-at-{size}-KB");
            report.ratio(&name, [peak.max(parked) / bound]);
        }
        let cache = of("cache") / of("cache-bound");
        report.ratio("S12-cache-of-its-bound", [cache]);
    }
}

fn count() -> HashMap<String, f64> {
    let program = std::env::current_exe().expect("it runs");
    let output = Command::new(program.with_file_name("memory")).output();
    let output = output.expect("it was built with this program");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lines = String::from_utf8(output.stdout).expect("text");
    let lines = lines.lines().filter_map(|line| line.split_once(' '));
    lines
        .map(|(name, value)| (name.to_owned(), value.parse().expect("a number")))
        .collect()
}
