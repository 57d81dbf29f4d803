//! Small disks that can be filled: file systems in memory.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cluster::{Cluster, give_to_owner};
use crate::fired::fired;
use crate::random::fresh_key;

const NEEDED: &str =
    "this test needs a small disk: run it as root, where `mount -t tmpfs` is allowed";

/// `ENOSPC` of Linux.
const NO_SPACE: i32 = 28;

/// A small disk. It goes with its cluster.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Cluster {
    /// A small disk that the server may write to.
    ///
    /// # Panics
    ///
    /// Where nothing can be mounted.
    #[must_use]
    pub fn disk(&self, mebibytes: u32) -> Disk {
        Disk::mount(&self.directory, mebibytes)
    }

    /// Creates and starts a server whose log of what it writes is on a small disk.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start) and [`disk`](Self::disk) do.
    pub async fn start_with_wal_on_disk(mebibytes: u32) -> (Self, Disk) {
        let (sender, disk) = std::sync::mpsc::channel();
        let cluster = Self::start_made(move || {
            let cluster = Self::prepare(false);
            let disk = cluster.disk(mebibytes);
            let place = format!("--waldir={}", disk.path.join("wal").display());
            cluster.init(&[place, "--wal-segsize=1".to_owned()]);
            let _ = sender.send(disk);
            cluster
        });
        let cluster = cluster.await;
        (cluster, disk.recv().expect("it was mounted"))
    }

    /// Writes to the log until its disk has no room, upon which the server ends itself.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn write_until_it_panics(&self) {
        const WRITE: &str = "select pg_logical_emit_message(false, 'full', repeat('x', 300000))";
        let mut session = self.connect().await;
        while sqlx::raw_sql(WRITE).execute(&mut session).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.says("PANIC:").await;
        let log = self.log();
        let why = log.lines().find(|line| line.contains("PANIC:"));
        let why = why.unwrap_or_default();
        assert!(why.contains("No space left on device"), "{why}");
        fired("server panic");
    }
}

impl Disk {
    fn mount(directory: &Path, mebibytes: u32) -> Self {
        let path = directory.join(format!("disk-{}", fresh_key()));
        std::fs::create_dir(&path).expect("the temporary directory is writable");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={mebibytes}m,mode=700"))
            .arg("tmpfs")
            .arg(&path)
            .output()
            .expect(NEEDED);
        let said = String::from_utf8_lossy(&mounted.stderr);
        assert!(mounted.status.success(), "{NEEDED} ({said})");
        give_to_owner(&path);
        Self { path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes what is left of it, to the last block.
    ///
    /// # Panics
    ///
    /// When it cannot be filled.
    pub fn fill(&self) {
        let mut ballast = File::create(self.ballast()).expect("the disk is writable");
        let block = [0; 4096];
        let full = loop {
            if let Err(error) = ballast.write_all(&block) {
                break error;
            }
        };
        assert_eq!(full.raw_os_error(), Some(NO_SPACE), "{full}");
        fired("disk full");
    }

    /// Gives back what was [taken](Self::fill).
    ///
    /// # Panics
    ///
    /// When nothing was.
    pub fn make_room(&self) {
        std::fs::remove_file(self.ballast()).expect("it was filled");
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}
