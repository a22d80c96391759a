import { Bullseye, Spinner } from "@patternfly/react-core";
import { lazy, type ReactNode, Suspense, useEffect } from "react";
import { goLive } from "./state/live";
import { arrive, clientOf, type Session, sessionState, viewerOf } from "./state/session";
import { useStore } from "./state/store";
import { SessionContext } from "./ui/session-context";
import { useRoute } from "./ui/route";
import { Toasts } from "./ui/Toasts";
import { Shell } from "./views/Shell";
import { Login, Unreachable } from "./views/Login";
import { Overview } from "./views/Overview";

const VolumesView = lazy(() => import("./views/Volumes"));
const VolumeView = lazy(() => import("./views/Volume"));
const LibraryView = lazy(() => import("./views/Library"));
const CloudInitView = lazy(() => import("./views/CloudInit"));
const UploadsView = lazy(() => import("./views/Uploads"));
const ExportsView = lazy(() => import("./views/Exports"));
const BinView = lazy(() => import("./views/Bin"));
const JobsView = lazy(() => import("./views/Jobs"));

export function App(): ReactNode {
  const state = useStore(sessionState);
  useEffect(() => void arrive(), []);
  return (
    <>
      {state.kind === "asking" && <Waiting />}
      {state.kind === "unreachable" && <Unreachable message={state.message} />}
      {state.kind === "logged-out" && <Login message={state.message} />}
      {state.kind === "in" && <Inside session={state.session} />}
      <Toasts />
    </>
  );
}

function Inside({ session }: { session: Session }): ReactNode {
  const viewer = viewerOf(session);
  const client = clientOf(session);
  useEffect(() => goLive(viewer, client), [viewer, client]);
  return (
    <SessionContext.Provider value={session}>
      <Shell session={session}>
        <Suspense fallback={<Waiting />}>
          <View key={viewer} session={session} />
        </Suspense>
      </Shell>
    </SessionContext.Provider>
  );
}

function View({ session }: { session: Session }): ReactNode {
  const [name, id] = useRoute();
  switch (name) {
    case "volumes":
      return id ? <VolumeView key={id} id={id} /> : <VolumesView />;
    case "library":
      return <LibraryView />;
    case "cloud-init":
      return <CloudInitView />;
    case "uploads":
      return <UploadsView />;
    case "exports":
      return <ExportsView />;
    case "bin":
      return <BinView />;
    case "jobs":
      return <JobsView />;
    default:
      return <Overview session={session} />;
  }
}

function Waiting(): ReactNode {
  return (
    <Bullseye>
      <Spinner aria-label="Loading" />
    </Bullseye>
  );
}
