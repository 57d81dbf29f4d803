//! A standby that takes the place of its primary.

use std::fs;
use std::process::Command;

use crate::cluster::{Cluster, run};
use crate::fired::fired;
use crate::signal;
use crate::wait::until;

impl Cluster {
    /// A standby that streams what this server writes.
    ///
    /// # Panics
    ///
    /// When it does not come to that.
    pub async fn standby(&self) -> Self {
        let (source, password) = (self.url(), self.password.clone());
        let standby = Self::start_made(move || {
            let mut standby = Self::prepare(false);
            standby.password = password;
            run(standby.program("pg_basebackup").args([
                "-d",
                &source,
                "-R",
                "-c",
                "fast",
                "-X",
                "stream",
                "--no-sync",
            ]));
            standby
        })
        .await;
        self.is_followed_by(&standby).await;
        standby
    }

    /// How far it has written.
    ///
    /// # Panics
    ///
    /// When it cannot be asked.
    pub async fn written(&self) -> String {
        let written = sqlx::query_scalar("select pg_current_wal_insert_lsn()::text");
        let written = written.fetch_one(&mut self.connect().await).await;
        written.expect("it can be asked")
    }

    /// Waits until a standby has applied all that is committed.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn is_followed_by(&self, standby: &Self) {
        // The end of what is written may lie before the first byte of a page.
        let mark = "select pg_logical_emit_message(true, 'mark', '')::text";
        let mark = sqlx::query_scalar(mark)
            .fetch_one(&mut self.connect().await)
            .await;
        let mark: String = mark.expect("it can be written");
        until("the standby to follow", async || {
            standby.lacks(&mark).await.is_none().then_some(())
        })
        .await;
    }

    /// How many bytes a standby lacks up to a place.
    async fn lacks(&self, place: &str) -> Option<i64> {
        let lacks =
            "select ceil(pg_wal_lsn_diff($1::text::pg_lsn, pg_last_wal_replay_lsn()))::int8";
        let lacks = sqlx::query_scalar(lacks).bind(place);
        let lacks: i64 = lacks.fetch_one(&mut self.connect().await).await.ok()?;
        (lacks > 0).then_some(lacks)
    }

    /// Stops the process by which a standby receives; the primary is not told.
    pub async fn stop_receiving(&self) {
        signal::stop(self.receiver().await).await;
    }

    async fn receiver(&self) -> u32 {
        until("a walreceiver", async || {
            let mut children = signal::children(self.postmaster()).into_iter();
            children.find(|pid| {
                let name = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&name).contains("walreceiver")
            })
        })
        .await
    }

    /// The end of a host: all its processes are killed at once, and nothing of them is left.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub async fn vanish(&self) {
        let postmaster = self.postmaster();
        // The first, so that it sees none of the others die.
        let mut processes = vec![postmaster];
        processes.extend(signal::children(postmaster));
        // One that has ended meanwhile is gone, too.
        let killed = Command::new("sh")
            .args(["-c", "kill -KILL \"$@\" 2>/dev/null", "sh"])
            .args(processes.iter().map(u32::to_string))
            .status();
        killed.expect("there is a shell");
        until("all its processes to be gone", async || {
            let mut left = processes.iter().map(|pid| signal::state(*pid));
            left.all(|state| matches!(state, None | Some('Z')))
                .then_some(())
        })
        .await;
        // Its number may be another's soon.
        let _ = fs::remove_file(self.directory.join("data/postmaster.pid"));
        fired("server kill");
    }

    /// Makes the primary of a standby whose receiver is [stopped](Self::stop_receiving), after `old`
    /// has vanished, which had written up to a place. The receiver reads no more: what is under way to
    /// it is lost with the old one.
    ///
    /// # Panics
    ///
    /// When it is not made one.
    pub async fn take_over(&self, written: &str) {
        let receiver = self.receiver().await;
        signal::send(receiver, "TERM");
        signal::go_on(receiver);
        until("the receiver to end", async || {
            signal::state(receiver)
                .is_none_or(|state| state == 'Z')
                .then_some(())
        })
        .await;
        if let Some(bytes) = self.lacks(written).await {
            println!("{bytes} bytes of the old primary are lost");
            fired("tail lost");
        }
        run(self.program("pg_ctl").args(["-w", "promote"]));
        fired("promotion");
    }
}
