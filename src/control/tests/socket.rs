//! Clients that are slow, unwelcome or left behind, and the socket's own life.

use super::*;

#[tokio::test]
async fn a_client_that_leaves_its_answers_unread_is_disconnected() {
    let fixture = Fixture::with_deadline(Duration::from_millis(50));
    let mut slow = fixture.client().await;
    slow.send(r#"{"execute":"huge"}"#).await;
    let mut other = fixture.client().await;
    assert_eq!(
        other.ask(r#"{"execute":"echo"}"#).await,
        json!({"return": {}})
    );
    // The write side tells: once the server has closed, sending fails.
    let closed = async {
        while slow.0.get_mut().write_all(b"\n").await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), closed)
        .await
        .unwrap();
    assert_eq!(
        other.ask(r#"{"execute":"echo"}"#).await,
        json!({"return": {}})
    );
}

#[tokio::test]
async fn a_client_that_leaves_only_events_unread_misses_some_and_stays() {
    let fixture = Fixture::with_deadline(Duration::from_millis(50));
    let mut slow = fixture.client().await;
    let mut other = fixture.client().await;
    let data = json!("x".repeat(60_000));
    while fixture.events.dropped() == 0 {
        fixture.events.publish("MANY", data.clone());
        assert_eq!(other.line().await["event"], "MANY");
        // Longer than the deadline in all, were it one for events.
        assert_eq!(
            other.ask(r#"{"execute":"echo"}"#).await,
            json!({"return": {}})
        );
    }
    slow.send(r#"{"execute":"echo","id":"still here"}"#).await;
    loop {
        let line = slow.line().await;
        if line["id"] == "still here" {
            break;
        }
        assert_eq!(line["event"], "MANY");
    }
}

#[tokio::test]
async fn an_event_for_one_client_reaches_only_that_one() {
    let fixture = Fixture::start();
    let mut first = fixture.client().await;
    let mut second = fixture.client().await;
    let ids: Vec<_> = (0..2).map(ClientId).collect();
    assert!(fixture.events.publish_to(ids[0], "YOURS", json!({})));
    assert_eq!(first.line().await["event"], "YOURS");
    assert_eq!(
        second.ask(r#"{"execute":"echo"}"#).await,
        json!({"return": {}})
    );
    drop(second);
    let left = async {
        while fixture.events.publish_to(ids[1], "YOURS", json!({})) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), left)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stop_answers_what_has_begun_and_removes_the_file() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    client.send(r#"{"execute":"wait","id":9}"#).await;
    fixture.toy.begun.notified().await;
    fixture.events.publish("SHUTDOWN", json!({}));
    fixture.shutdown.cancel();
    fixture.toy.permits.add_permits(1);
    assert_eq!(client.line().await["event"], "SHUTDOWN");
    assert_eq!(client.line().await["id"], 9);
    assert!(client.at_end().await);
    fixture.server.await.unwrap();
    assert!(!fixture.path.exists());
}

#[tokio::test]
async fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::start();
    let error = Server::bind(&fixture.path, Access::default()).unwrap_err();
    assert!(
        error.to_string().starts_with("another daemon listens on "),
        "{error}"
    );
    assert!(fixture.path.exists());

    let stale = fixture.path.with_file_name("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let server = Server::bind(&stale, Access::default()).unwrap();
    assert_eq!(server.path(), stale);
    let mode = std::fs::metadata(&stale).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(server);
    assert!(!stale.exists());

    let file = fixture.path.with_file_name("file");
    std::fs::write(&file, "precious").unwrap();
    let error = Server::bind(&file, Access::default()).unwrap_err();
    assert!(error.to_string().contains("other than a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[tokio::test]
async fn a_refused_user_is_told_which_key_to_change() {
    let directory = tempfile::tempdir().unwrap();
    let path: &Path = &directory.path().join("control.sock");
    let nobody = Access {
        uids: vec![nix::unistd::geteuid().as_raw() + 1],
        gids: Vec::new(),
    };
    let server = Server::bind(path, nobody).unwrap();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(Toy::new(), EventBus::new(), stop.clone()));
    let mut client = Client(BufReader::new(UnixStream::connect(path).await.unwrap()));
    let line = client.line().await;
    let desc = line["error"]["desc"].as_str().unwrap();
    assert!(desc.contains("control.allow-uids"), "{desc}");
    assert!(desc.contains(&nix::unistd::geteuid().to_string()), "{desc}");
    assert!(client.at_end().await);
    stop.cancel();
    serving.await.unwrap();
}

#[tokio::test]
async fn two_daemons_that_start_at_once_do_not_replace_each_other() {
    use nix::fcntl::{Flock, FlockArg};
    let directory = tempfile::tempdir().unwrap();
    let first = std::fs::File::open(directory.path()).unwrap();
    let starting = Flock::lock(first, FlockArg::LockExclusive).unwrap();
    let path = directory.path().join("control.sock");
    let error = Server::bind(&path, Access::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("another daemon is just starting on "),
        "{error}"
    );
    drop(starting);
    Server::bind(&path, Access::default()).unwrap();
}
