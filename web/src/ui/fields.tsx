import {
  Checkbox,
  FormGroup,
  FormHelperText,
  FormSelect,
  FormSelectOption,
  HelperText,
  HelperTextItem,
  NumberInput,
  TextInput,
} from "@patternfly/react-core";
import type { ReactNode } from "react";
import { normaliseUid } from "../state/session";

function Help({ id, text, isError }: { id: string; text: ReactNode; isError?: boolean }): ReactNode {
  if (!text) return null;
  return (
    <FormHelperText>
      <HelperText id={`${id}-help`} aria-live="polite">
        <HelperTextItem variant={isError ? "error" : "default"}>{text}</HelperTextItem>
      </HelperText>
    </FormHelperText>
  );
}

export function TextField(props: {
  id: string;
  label: string;
  value: string;
  onChange: (value: string) => void;
  isRequired?: boolean;
  help?: ReactNode;
  error?: string | undefined;
  placeholder?: string;
  list?: readonly string[];
  autoFocus?: boolean;
}): ReactNode {
  const { id, error, help } = props;
  return (
    <FormGroup label={props.label} fieldId={id} isRequired={props.isRequired ?? false}>
      <TextInput
        id={id}
        value={props.value}
        isRequired={props.isRequired ?? false}
        spellCheck={false}
        autoComplete="off"
        autoFocus={props.autoFocus ?? false}
        placeholder={props.placeholder}
        validated={error === undefined ? "default" : "error"}
        aria-describedby={(error ?? help) ? `${id}-help` : undefined}
        list={props.list ? `${id}-list` : undefined}
        onChange={(_event, value) => props.onChange(value)}
      />
      {props.list && (
        <datalist id={`${id}-list`}>
          {props.list.map((one) => (
            <option key={one} value={one} />
          ))}
        </datalist>
      )}
      <Help id={id} text={error ?? help} isError={error !== undefined} />
    </FormGroup>
  );
}

/** A client's uid. `shown` false: there is nothing to choose. */
export function OwnerField(props: {
  id: string;
  shown: boolean;
  value: string;
  onChange: (value: string) => void;
}): ReactNode {
  if (!props.shown) return null;
  const isGood = normaliseUid(props.value) !== null;
  return (
    <TextField
      id={props.id}
      label="Owner"
      isRequired
      value={props.value}
      onChange={props.onChange}
      help="The client it will belong to."
      error={isGood ? undefined : "32 hex digits, or a UUID with dashes"}
    />
  );
}

export function SizeField(props: {
  id: string;
  label: string;
  value: string;
  onChange: (value: string) => void;
  help?: ReactNode;
  isRequired?: boolean;
}): ReactNode {
  const { id, value, onChange } = props;
  const count = Number(value);
  const isWrong = value !== "" && !(count > 0);
  return (
    <FormGroup label={`${props.label} (GB)`} fieldId={id} isRequired={props.isRequired ?? false}>
      <NumberInput
        id={id}
        inputName={id}
        inputAriaLabel={`${props.label} in GB`}
        inputProps={{ id, step: "any", "aria-describedby": props.help ? `${id}-help` : undefined }}
        value={value === "" ? "" : count}
        min={0}
        validated={isWrong ? "error" : "default"}
        minusBtnAriaLabel="Less"
        plusBtnAriaLabel="More"
        onMinus={() => onChange(String(Math.max(1, Math.round(count) - 1)))}
        onPlus={() => onChange(String(Math.round(count) + 1))}
        onChange={(event) => onChange((event.target as HTMLInputElement).value)}
      />
      <Help id={id} text={isWrong ? "It has to be more than 0." : props.help} isError={isWrong} />
    </FormGroup>
  );
}

export function SelectField<V extends string>(props: {
  id: string;
  label: string;
  value: V;
  onChange: (value: V) => void;
  options: readonly (readonly [value: V, label: string])[];
  help?: ReactNode;
}): ReactNode {
  const { id } = props;
  return (
    <FormGroup label={props.label} fieldId={id}>
      <FormSelect
        id={id}
        value={props.value}
        aria-describedby={props.help ? `${id}-help` : undefined}
        onChange={(_event, value) => props.onChange(value as V)}
      >
        {props.options.map(([value, label]) => (
          <FormSelectOption key={value} value={value} label={label} />
        ))}
      </FormSelect>
      <Help id={id} text={props.help} />
    </FormGroup>
  );
}

export function CheckField(props: {
  id: string;
  label: string;
  value: boolean;
  onChange: (value: boolean) => void;
  help?: string;
  isDisabled?: boolean;
}): ReactNode {
  return (
    <Checkbox
      id={props.id}
      label={props.label}
      description={props.help}
      isChecked={props.value}
      isDisabled={props.isDisabled ?? false}
      onChange={(_event, checked) => props.onChange(checked)}
    />
  );
}
