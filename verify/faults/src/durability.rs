//! Commits of a plain session, on a server that does not wait for them to be durable.

use crate::cluster::Cluster;
use crate::fired::fired;
use crate::wait::until;

/// What a plain session commits.
#[derive(Debug)]
pub struct Plain(());

impl Plain {
    /// Makes a server acknowledge commits before they are on the disk, and leave them off it for long.
    pub async fn new(cluster: &Cluster) -> Self {
        cluster
            .execute(&[
                "create table plain (id bigint generated always as identity)",
                "alter system set synchronous_commit = off",
                "alter system set wal_writer_delay = '10s'",
                "alter system set wal_writer_flush_after = '1GB'",
            ])
            .await;
        cluster.shut("fast");
        cluster.boot();
        Self(())
    }

    /// That a new session is one of those.
    pub async fn is_asynchronous(&self, cluster: &Cluster) {
        until("commits not to wait", async || {
            let setting = sqlx::query_scalar("show synchronous_commit");
            let setting = setting.fetch_one(&mut cluster.connect().await).await;
            let setting: String = setting.ok()?;
            (setting == "off").then_some(())
        })
        .await;
        fired("synchronous_commit off");
    }

    /// A commit that is acknowledged.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub async fn commit(&self, cluster: &Cluster) -> i64 {
        let insert = sqlx::query_scalar("insert into plain default values returning id");
        let id = insert.fetch_one(&mut cluster.connect().await).await;
        id.expect("it is acknowledged")
    }

    /// Whether a commit that was acknowledged is gone.
    ///
    /// # Panics
    ///
    /// When the server cannot be asked.
    pub async fn is_lost(&self, cluster: &Cluster, id: i64) -> bool {
        let there = sqlx::query_scalar("select exists (select from plain where id = $1)").bind(id);
        let there = there.fetch_one(&mut cluster.connect().await).await;
        let there: bool = there.expect("the server can be asked");
        if !there {
            fired("plain commit lost");
        }
        !there
    }
}
