//! The tunnel connections of one pod, shared by its streams.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use culvert_core::addr::HboneAddr;
use culvert_core::identity::Identity;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::Settings;
use super::client::{self, Accepted, Connection, RequestError, TakenPlace};
use super::first::First;
use super::headers::{ConnectHeaders, InvalidRequest};

/// Connections on which a request that its peer never saw is tried again.
const ATTEMPTS: usize = 4;

/// A connection on which a stream has waited this long for the peer's window is not filled up
/// beyond the number of streams that is safe.
const STALLED: Duration = Duration::from_millis(100);

/// What two streams must have in common to share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose certificate we show.
    pub source: Identity,
    /// Who the next hop may be, in the order of preference.
    pub expect: Vec<Identity>,
    pub next_hop: HboneAddr,
    /// The address of the pod that is seen by the next hop.
    pub source_ip: IpAddr,
}

/// A verified connection to a next hop.
pub struct Dialled<T> {
    pub io: T,
    /// Ready when the connection must not be used any longer, whatever is open on it.
    pub cut_off: BoxFuture<'static, ()>,
}

/// Never cut off.
impl<T> From<T> for Dialled<T> {
    fn from(io: T) -> Self {
        Self { io, cut_off: Box::pin(std::future::pending()) }
    }
}

/// A CONNECT through the pool that failed; `E` is the error of the dial closure.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError<E> {
    /// No verified TLS connection to the next hop.
    #[error("{0}")]
    Dial(E),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    /// The pod is being removed or the agent drained.
    #[error("the pool takes no new streams")]
    Closed,
}

/// The pool of one pod. Dropping it ends all its connections at once, and the streams on them
/// abnormally.
pub struct Pool {
    shared: Arc<PoolShared>,
}

struct PoolShared {
    settings: Settings,
    table: Mutex<Table>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Table {
    closed: bool,
    hops: HashMap<Arc<PoolKey>, Arc<Hop>>,
    /// All running drivers, also of connections that have left `hops`.
    drivers: HashMap<u64, AbortHandle>,
}

/// The connections of one key.
#[derive(Default)]
struct Hop {
    connections: Mutex<Vec<(u64, Connection)>>,
    /// Held while a connection is made and until its peer's limits are known.
    opening: Arc<tokio::sync::Mutex<()>>,
    /// A stream has ended on one of the connections.
    freed: Arc<Notify>,
}

impl Pool {
    pub fn new(settings: Settings) -> Self {
        let table = Mutex::default();
        Self { shared: Arc::new(PoolShared { settings, table, next_id: AtomicU64::new(0) }) }
    }

    /// Opens a stream on a shared connection, or on a new one that `dial` makes.
    ///
    /// One connection per key is made at a time; others wait for it, or for a stream to end. When
    /// it fails, the failure is its caller's alone and the next caller tries.
    pub async fn connect<T, E, D, F>(
        &self,
        key: &PoolKey,
        headers: &ConnectHeaders,
        dial: D,
    ) -> Result<Accepted, ConnectError<E>>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<Dialled<T>, E>>,
    {
        self.connect_sending(&mut First::none(), key, headers, dial).await
    }

    /// As [`Pool::connect`]; `first` is sent with the request.
    pub async fn connect_sending<T, E, D, F>(
        &self,
        first: &mut First<'_>,
        key: &PoolKey,
        headers: &ConnectHeaders,
        dial: D,
    ) -> Result<Accepted, ConnectError<E>>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<Dialled<T>, E>>,
    {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let request = headers.request()?;
            let (connection, place) = self.checkout(key, &dial).await?;
            match connection.connect_at(request, place, first).await {
                Err(RequestError::Unprocessed(_)) if attempts < ATTEMPTS => {
                    self.forget(key, &connection);
                }
                result => return result.map_err(ConnectError::Request),
            }
        }
    }

    /// No new streams; connections end with their last stream.
    pub fn drain(&self) {
        let mut table = self.shared.table.lock();
        table.closed = true;
        for (_, hop) in table.hops.drain() {
            hop.connections.lock().clear();
        }
    }

    /// Open connections, also those that only finish their streams.
    pub fn connections(&self) -> usize {
        self.shared.table.lock().drivers.len()
    }

    async fn checkout<T, E, D, F>(
        &self,
        key: &PoolKey,
        dial: &D,
    ) -> Result<(Connection, TakenPlace), ConnectError<E>>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<Dialled<T>, E>>,
    {
        loop {
            let (key, hop) = self.hop(key).ok_or(ConnectError::Closed)?;
            let freed = hop.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if let Some(found) = hop.pick(&self.shared.settings) {
                return Ok(found);
            }
            let guard = tokio::select! {
                guard = hop.opening.clone().lock_owned() => guard,
                () = freed => continue,
            };
            if let Some(found) = hop.pick(&self.shared.settings) {
                return Ok(found);
            }
            let Dialled { io, cut_off } = dial().await.map_err(ConnectError::Dial)?;
            let (connection, mut driver) =
                client::handshake_with(io, &self.shared.settings, hop.freed.clone());
            let place = connection.shared.take_place();
            driver.hold_until_settled(Box::new(guard));
            self.shared
                .start(key, &hop, connection.clone(), driver, cut_off)
                .ok_or(ConnectError::Closed)?;
            return Ok((connection, place));
        }
    }

    fn hop(&self, key: &PoolKey) -> Option<(Arc<PoolKey>, Arc<Hop>)> {
        let mut table = self.shared.table.lock();
        if table.closed {
            return None;
        }
        if let Some((key, hop)) = table.hops.get_key_value(key) {
            return Some((key.clone(), hop.clone()));
        }
        let (key, hop) = (Arc::new(key.clone()), Arc::<Hop>::default());
        table.hops.insert(key.clone(), hop.clone());
        Some((key, hop))
    }

    fn forget(&self, key: &PoolKey, connection: &Connection) {
        if let Some((_, hop)) = self.hop(key) {
            let same = |other: &Connection| Arc::ptr_eq(&other.shared, &connection.shared);
            hop.connections.lock().retain(|(_, other)| !same(other));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut table = self.shared.table.lock();
        table.closed = true;
        table.hops.clear();
        table.drivers.drain().for_each(|(_, driver)| driver.abort());
    }
}

impl Hop {
    /// A place on a connection where no stream can stall it, or, once there are many connections,
    /// on the least used one without a stalled stream.
    fn pick(&self, settings: &Settings) -> Option<(Connection, TakenPlace)> {
        let mut connections = self.connections.lock();
        connections.retain(|(_, connection)| connection.shared.is_usable());
        let free =
            |limit: usize, connection: &Connection| connection.shared.open_streams() < limit.max(1);
        let safe = connections
            .iter()
            .map(|(_, connection)| connection)
            .find(|connection| free(connection.shared.safe_limit(), connection));
        let chosen = match safe {
            Some(connection) => connection,
            None if connections.len() < settings.spread => return None,
            None => connections
                .iter()
                .map(|(_, connection)| connection)
                .filter(|connection| connection.shared.peer.is_settled())
                .filter(|connection| free(connection.shared.limit(), connection))
                .filter(|connection| connection.shared.stalled_streams(STALLED) == 0)
                .min_by_key(|connection| connection.shared.open_streams())?,
        };
        Some((chosen.clone(), chosen.shared.take_place()))
    }
}

impl PoolShared {
    /// Runs the driver of a new connection. `None` if the pool was closed meanwhile.
    fn start<T>(
        self: &Arc<Self>,
        key: Arc<PoolKey>,
        hop: &Arc<Hop>,
        connection: Connection,
        mut driver: client::Driver<T>,
        cut_off: BoxFuture<'static, ()>,
    ) -> Option<()>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let id = self.next_id.fetch_add(1, Relaxed);
        let pool = Arc::downgrade(self);
        let idle_pool = pool.clone();
        let ended_key = key.clone();
        let retire_idle = Box::new(move || retire(&idle_pool, &key, id));
        driver.retire_when_idle(self.settings.idle, retire_idle);
        let mut table = self.table.lock();
        if table.closed {
            return None;
        }
        let task = tokio::spawn(async move {
            driver.run(cut_off).await;
            retire(&pool, &ended_key, id);
            if let Some(pool) = pool.upgrade() {
                pool.table.lock().drivers.remove(&id);
            }
        });
        table.drivers.insert(id, task.abort_handle());
        hop.connections.lock().push((id, connection));
        Some(())
    }
}

/// Takes an idle connection, and its hop if it was the last one, out of the pool.
fn retire(pool: &Weak<PoolShared>, key: &PoolKey, id: u64) -> bool {
    let Some(pool) = pool.upgrade() else { return true };
    let mut table = pool.table.lock();
    let Some(hop) = table.hops.get(key).cloned() else { return true };
    let mut connections = hop.connections.lock();
    let used = |connection: &Connection| {
        connection.shared.open_streams() > 0 && connection.shared.is_usable()
    };
    if connections.iter().any(|(other, connection)| *other == id && used(connection)) {
        return false;
    }
    connections.retain(|(other, connection)| *other != id && connection.shared.is_usable());
    // Whoever waits to open a connection holds the hop, too, and would lose it to a second one.
    if connections.is_empty() && Arc::strong_count(&hop) == 2 {
        table.hops.remove(key);
    }
    true
}

#[cfg(test)]
mod tests;
